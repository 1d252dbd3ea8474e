from pathlib import Path

import pytest
from written_runs import write_three_seeds


@pytest.fixture
def three_seeds(tmp_path) -> Path:
    return write_three_seeds(tmp_path)
