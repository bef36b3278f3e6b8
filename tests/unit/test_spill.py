"""What a waiting forward pass holds goes to disk and comes back bit for bit; what others share stays."""

import greenlet
import torch

from prunus.calibration.spill import Spilled, SpillFiles, held_storages

SIZE = 4096


def waiting(shared, content):
    """A function that waits in its middle, holding tensors in locals, views and containers."""

    def inner(x, nested):
        greenlet.getcurrent().parent.switch()
        return x + nested[0]["y"] + shared

    def outer():
        view = content.clone()[1:]
        return inner(view, [{"y": content.clone()[1:] * 2}])

    run = greenlet.greenlet(outer)
    run.switch()
    return run


def test_memory_is_given_up_and_comes_back_bit_for_bit(tmp_path):
    shared, content = torch.randn(SIZE), torch.randn(SIZE + 1)
    run, other = waiting(shared, content), waiting(shared, content)
    common = held_storages(other.gr_frame)
    own = [s for address, s in held_storages(run.gr_frame).items() if address not in common]
    files = SpillFiles(tmp_path)
    spilled = Spilled(own, files[0])
    assert len(own) == 2, "the view's storage and the one in the container; not the shared ones"
    assert [storage.nbytes() for storage in own] == [0, 0]
    spilled.restore()
    assert torch.equal(run.switch(), content[1:] + content[1:] * 2 + shared)
    assert list(tmp_path.iterdir()) == []
