"""Trains a small network in the allocator's range and prints every block it took and freed.

For each block: its place, and its bytes (less than 0 if freed).
"""

from __future__ import annotations

import json

import torch
from torch.profiler import ProfilerActivity, profile

from tests.helpers.tensor_range import range_state
from vlm_tune.train.allocator import open_range

LENGTHS = (300, 170, 420, 300)


def train() -> None:
    torch.manual_seed(0)
    layers = [
        torch.nn.Linear(96, 256),
        torch.nn.GELU(),
        torch.nn.Linear(256, 96),
        torch.nn.Linear(96, 2000),
    ]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for length in LENGTHS:
        loss = torch.nn.functional.cross_entropy(
            model(torch.randn(length, 96)), torch.randint(2000, (length,))
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


assert open_range()
start = torch.empty(1 << 20).data_ptr()  # an empty range's first block lies at its start
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
    train()
events, left = [], list(profiled.profiler.kineto_results.experimental_event_tree())
while left:
    event = left.pop()
    left += event.children
    if event.tag.name == "Allocation":
        events.append(
            (event.start_time_ns, event.extra_fields.ptr - start, event.extra_fields.alloc_size)
        )
# The order of what happened at one time is not known: there is no such thing on one thread.
print(
    json.dumps(
        {"highest": range_state().highest, "events": [event[1:] for event in sorted(events)]}
    )
)
