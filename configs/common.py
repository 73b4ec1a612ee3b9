"""What several recipes share."""

import os


def shared_data(name: str) -> str:
    """Path of a data set under LM_SHARED_DATA, or ../shared/data when that is not set."""
    return os.path.join(os.environ.get("LM_SHARED_DATA", "../shared/data"), name)
