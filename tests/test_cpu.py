import pytest
import torch

from vaenb.cpu import one_thread


def test_threads_and_denormal_numbers_are_as_before_afterwards():
    threads, small = torch.get_num_threads(), torch.tensor(1e-40)
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
            with pytest.raises(RuntimeError), one_thread():
                raise RuntimeError
            assert small * 1.0 == 0
        assert torch.get_num_threads() == 2
        assert small * 1.0 > 0
    finally:
        torch.set_num_threads(threads)
