"""What validation makes of the losses of its batches."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxalign.objectives import Loss
from jaxalign.train.phases.build import Term
from jaxalign.train.validate import _average


@pytest.mark.parametrize("average", ["tokens", "microbatch"])
def test_a_term_of_every_second_update_has_half_of_its_weight(average):
    """As in training, so that both losses are one number and the best checkpoint is that of it."""
    phase = SimpleNamespace(terms=(Term("own", None, 1.0), Term("rare", None, 10.0, every=2)))
    optim = SimpleNamespace(average=average)
    run = SimpleNamespace(phases={"align": phase}, config=SimpleNamespace(optim=optim))
    losses = [{"own": Loss(6.0, 2.0, {}), "rare": Loss(0.4, 2.0, {})}] * 2
    share, plain = _average(run, "align", losses, np.array([2.0, 2.0]))
    assert share == plain == pytest.approx(3.0 + 10.0 / 2 * 0.2)
