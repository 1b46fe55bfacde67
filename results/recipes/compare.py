"""What each of the four recipes prints: DiPOD beside beta = 0, from the same seed."""

import time

import torch


def compare(train, updates, beta):
    """Prints what train(beta, updates) returns: the mean reward or return before and after."""
    torch.set_num_threads(1)
    for value in (beta, 0.0):
        torch.manual_seed(0)
        begin = time.process_time()
        before, after = train(value, updates)
        seconds = time.process_time() - begin
        print(f"beta {value}: {before:.2f} -> {after:.2f}, {seconds:.0f} s of one core", flush=True)
