"""Windows as batches."""

import torch

from secateurs.model.batches import first_windows


def test_the_first_windows_hold_at_least_so_many_tokens():
    batches = [{"input_ids": torch.arange(1200).view(3, 400) + 1200 * i} for i in range(2)]
    # 1000 tokens are two windows and a half, and 1024 are run back together
    for tokens, sizes in ((1000, [2, 1]), (1300, [2, 1, 1]), (800, [2]), (1, [1]), (9999, [2, 1, 2, 1])):
        found = first_windows(batches, tokens)
        assert [len(batch["input_ids"]) for batch in found] == sizes
        ids = torch.cat([batch["input_ids"] for batch in found]).flatten()
        assert torch.equal(ids, torch.arange(len(ids)))
