"""Settings for all tests: reproducible, CPU threads shared among workers."""

import matplotlib
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

matplotlib.use("Agg")
torch.set_num_threads(1)

settings.register_profile(
    "shapwrap",
    deadline=None,
    derandomize=True,
    max_examples=25,
    # The drawn cases are small already, and shrinking rebuilds models for minutes.
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("shapwrap")


@pytest.fixture(autouse=True)
def _seeded():
    """Tests may draw; what they draw does not depend on their order."""
    torch.manual_seed(0)
