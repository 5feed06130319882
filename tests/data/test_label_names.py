"""What may leave a site as the name of a label, rule by rule, and real label sets that must pass."""

import random
from collections.abc import Mapping

import pytest

from fedbt_app.config import LONGEST_LABEL, MOST_LABELS
from fedbt_app.data import label_names, phenotypes
from fedbt_app.data.label_names import Labels, Rule, findings, refuse_text
from fedbt_app.errors import FedBTError

OFTEN = 20  # rows of each name


def evenly(*names: str, rows: int = OFTEN) -> dict[str, int]:
    return dict.fromkeys(names, rows)


def rules_that_speak(counts: Mapping[str, int]) -> set[Rule]:
    return {rule for rule in label_names.RULES if rule(Labels(counts))}


def zipf(names: list[str], rows: int) -> dict[str, int]:
    """Deal rows as codes of diagnoses are: few frequent ones, a long tail of such that stand once."""
    generator = random.Random(1)
    weights = [1 / rank for rank in range(1, len(names) + 1)]
    counts: dict[str, int] = {}
    for name in generator.choices(names, weights, k=rows):
        counts[name] = counts.get(name, 0) + 1
    return counts


def parted(names: str) -> list[str]:
    return names.replace("\n", "").split("|")


def icd_10() -> list[str]:
    return [
        f"{letter}{two:02}.{one}" for letter in "ABCEIJK" for two in range(40) for one in range(6)
    ]


# as a public collection of transcriptions has them, blanks included
SPECIALTIES = """
Cardiovascular / Pulmonary|Surgery|Consult - History and Phy.|General Medicine|Orthopedic|Radiology|
Neurology|Emergency Room Reports|Discharge Summary|Hematology - Oncology|SOAP / Chart / Progress Notes|
Urology|Letters|Physical Medicine - Rehab|Pain Management|Obstetrics / Gynecology|Gastroenterology|
Nephrology|Pediatrics
"""
FINDINGS = """
No Finding|Enlarged Cardiomediastinum|Cardiomegaly|Lung Opacity|Lung Lesion|Edema|Consolidation|
Pneumonia|Atelectasis|Pneumothorax|Pleural Effusion|Pleural Other|Fracture|Support Devices
"""
REAL = {
    "5 classes of a rating": evenly("1", "2", "3", "4", "5", rows=2),
    "stars": evenly("1 star", "2 stars", "3 stars"),
    "agreement": evenly("Strongly Agree", "Agree", "Neutral", "Disagree", "Strongly Disagree"),
    "yes and no": {"yes": 1, "no": 1},
    "polarity": evenly("-1", "0", "1"),
    "types of entities": evenly("Chemical", "Disease", "cell_line", "DNA", "Sign or Symptom"),
    "specialties": evenly(*parted(SPECIALTIES)),
    "findings of X-rays": evenly(*parted(FINDINGS)),
    "stages": evenly("Stage I", "Stage II", "Stage III", "Stage IV", "T2N0M0"),
    "decades": evenly("1990-1999", "2000-2009", "2010-2019"),
    "ranges": evenly("0-18", "19-64", "65+"),
    "ICD-10, 1680 codes": zipf(icd_10(), 6000),
    "ICD-9": zipf([f"{code}.{digit}" for code in range(250, 450) for digit in range(3)], 3000),
    "ICD-9 without points": zipf([str(code) for code in range(25000, 25600)], 3000),
    "titles of diagnoses": evenly(
        "Unspecified atrial fibrillation",
        "Essential (primary) hypertension",
        "Type 2 diabetes mellitus without complications",
        "Malignant neoplasm of unspecified site of unspecified female breast",
        "Certain conditions originating in the perinatal period",
    ),
    "a Greek letter, a sign": evenly("α-thalassaemia", "β-thalassaemia", "none/other"),
    "relations": evenly("CPR:3", "CPR:4", "CPR:9", "false"),
    "enzymes": evenly("EC 1.1.1.27", "EC 2.7.11.1", "EC 3.4.21.4"),
}


@pytest.mark.parametrize("counts", REAL.values(), ids=list(REAL))
def test_real_label_sets_pass(counts: Mapping[str, int]) -> None:
    assert findings(counts) == []


def test_the_embedded_label_set_passes() -> None:
    for rows in phenotypes.ROWS["terms of one organ system"]().values():
        counts: dict[str, int] = {}
        for row in rows:
            counts[row["label"]] = counts.get(row["label"], 0) + 1
        assert findings(counts) == []


HOSTILE: dict[Rule, list[Mapping[str, int]]] = {
    label_names.too_many: [evenly(*(f"c{number}" for number in range(MOST_LABELS + 1)))],
    label_names.too_long: [evenly("x" * (LONGEST_LABEL + 1), "heart")],
    label_names.rarely_repeated: [
        evenly("alpha", "beta", "gamma", rows=1),
        evenly(*(f"miller{number}" for number in range(25)), rows=1),
        # a few notes were copied
        {f"p{number}": 1 + (number < 10) for number in range(100)},
    ],
    label_names.rare_phrases: [
        {"no finding": 500} | {f"pain in the {number} rib": 1 for number in range(40)}
    ],
    label_names.sentences: [
        evenly("heart", "She was seen on the ward today."),
        evenly("heart", "pain in the left knee after a fall on the stairs at home again"),
    ],
    label_names.dates: [
        evenly("heart", date)
        for date in (
            *("1956-03-12", "1956-03-12T10:30", "12.03.1956", "3/12/56", "12-03-1956", "2020/1/2"),
            *("12 March 1956", "12. März 1956", "March 3, 1999", "born 1956-03-12", "3rd May 2001"),
            "12-Mar-1956",
        )
    ],
    label_names.records: [
        evenly("heart", number)
        for number in (
            *("123456", "MRN0123456", "id 7654321", "20240101", "0171 234 56 78", "123-45-6789"),
            *("(555) 123-4567", "943 476 5919", "+49 171 2345678"),
        )
    ],
    label_names.addresses: [evenly("heart", "a.b@clinic.org"), evenly("x", "https://x.org/a")],
    label_names.titles: [
        evenly("heart", "liver", name) for name in ("Mrs Smith", "seen by Dr. Who", "Frau Ögün")
    ],
    label_names.persons: [
        evenly(*names)
        for names in (
            ("Anna Miller", "Ben Smith", "Carla Jones"),
            ("Given Family1", "Given Family2", "Given Family3"),
            ("MILLER, ANNA", "SMITH, BEN", "heart"),
            ("Miller, A.", "Smith, B. C."),
            ("J. O'Neil", "M. Le Goff", "K. van den Berg"),
            ("Mary-Jane Watson", "Zoë Ångström", "Ödön von Horváth"),
        )
    ],
}


def test_each_rule_has_a_hostile_counterpart() -> None:
    assert set(HOSTILE) == set(label_names.RULES)
    for rule, examples in HOSTILE.items():
        for counts in examples:
            assert rule in rules_that_speak(counts), (rule.__name__, list(counts)[-3:])


def test_a_refusal_has_counts_and_the_cure_but_no_name() -> None:
    for examples in HOSTILE.values():
        for counts in examples:
            with pytest.raises(FedBTError) as caught:
                refuse_text(counts, "label-column=note")
            message = str(caught.value)
            assert message.startswith("label-column=note: ")
            assert "list them in labels-allowed" in message
            for name in counts:
                assert len(name) < 3 or name not in message


def test_a_site_of_three_rows_is_told_what_to_set() -> None:
    with pytest.raises(FedBTError) as caught:
        refuse_text(evenly("heart", "liver", "lung", rows=1), "label-column=label")
    assert str(caught.value) == (
        "label-column=label: 3 different values in 3 places, fewer than 2 of each: that looks like "
        "text or persons, which must not leave the site; name the column of the labels, or, if these "
        "are the labels, list them in labels-allowed"
    )
