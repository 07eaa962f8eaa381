"""Maps of a network at chosen layers, by hooks; the pass ends at the deepest of them."""

import contextlib


def choose_four(layers):
    """Four evenly spaced layers, the last among them; of fewer than four each once."""
    places = {max(0, len(layers) * i // 4 - 1) for i in (1, 2, 3, 4)}
    return [layers[place] for place in sorted(places)]


class _DeepestTapReached(Exception):
    pass


def read_taps(taps, run):
    """The maps that `run()` leaves at taps [(module, output -> map)], in order; the pass ends at the last.

    With --shard fsdp the network's own weights, those of no block, stay whole after it until the backward
    pass, or its next pass: it never learns, and nothing else reads them meanwhile."""
    maps = []

    def make_hook(module, read):
        def hook(module_, inputs, output):
            maps.append(read(output))
            if module is taps[-1][0]:
                raise _DeepestTapReached

        return hook

    handles = [module.register_forward_hook(make_hook(module, read)) for module, read in taps]
    try:
        with contextlib.suppress(_DeepestTapReached):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return maps
