"""How well text fits a model: what is dropped, cut or unknown, as counts."""

from dataclasses import astuple, dataclass

MOST_CUT = 0.01  # of the word pieces, or of the labelled words
MOST_UNKNOWN = 0.05  # of the word pieces that are read


@dataclass(frozen=True)
class Fit:
    """How much of some rows is not read, as they are longer than `max-length`; counts, which add
    up.

    Attributes
    ----------
    pieces, pieces_cut
        word pieces of the rows, special ones not counted, and those that are not read
    labelled, labelled_cut : words with a label of their own (ner), and those that are not read
    unknown : word pieces that are read as [UNK]
    dropped : rows without text, which are none of `rows`
    """

    rows: int = 0
    rows_cut: int = 0
    pieces: int = 0
    pieces_cut: int = 0
    labelled: int = 0
    labelled_cut: int = 0
    unknown: int = 0
    dropped: int = 0

    def __add__(self, other: "Fit") -> "Fit":
        mine, others = astuple(self), astuple(other)
        return Fit(*(ours + theirs for ours, theirs in zip(mine, others, strict=True)))

    @property
    def cut_share(self) -> float:
        """The share of word pieces that are not read."""
        return self.pieces_cut / max(1, self.pieces)

    @property
    def unknown_share(self) -> float:
        """The share of what is read that is [UNK]."""
        return self.unknown / max(1, self.pieces - self.pieces_cut)

    @property
    def warnings(self) -> list[str]:
        """What a person should know before trusting a score."""
        found = []
        if self.cut_share > MOST_CUT or self.labelled_cut > MOST_CUT * self.labelled:
            found.append(f"{self}: raise max-length")
        if self.unknown_share > MOST_UNKNOWN:
            found.append(
                f"{100 * self.unknown_share:.1f} % of the word pieces are [UNK]: the tokenizer does not fit the text"
            )
        return found

    def __str__(self) -> str:
        share = f"{100 * self.cut_share:.1f} % of the word pieces"
        if self.labelled:
            share += f" and {self.labelled_cut} of {self.labelled} labelled words"
        return f"{self.rows_cut} of {self.rows} rows are cut, {share} are not read"
