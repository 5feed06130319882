"""The one exception that is meant for a person."""

import re


def without_folders(text: str) -> str:
    """Shorten absolute paths to their last name: a site's folders are its own business."""
    return re.sub(r"(?<![\w.])~?/(?:[^\s/:'\"]+/)*(?=[^\s/:'\"])", "", text)


class FedBTError(Exception):
    """Something a user can mend: `str(error)` is one line that names the thing and says how.

    Raised for bad input only. It names files, columns, tensors and label names, never local text,
    so its message may travel to the server and into logs.
    """
