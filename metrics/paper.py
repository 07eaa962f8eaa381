"""The paper's own numbers, to stand beside ours."""

import re

from support.arguments import CLIP, LPIPS

# paper: tables 1, 2 and 6; table 6, LPIPS, is of the systems of table 1
IMAGES = """
system                  | table          | steps | nfe | clip    | pick    | hpsv2   | mps     | lpips
ADD, 512 px             | tables 1 and 6 |     1 |   1 | 35.0088 | 22.1524 | 27.0971 | 10.4340 | 0.6071
LCM                     | tables 1 and 6 |     1 |   2 | 28.4669 | 20.1267 | 23.8246 |  4.8134 | 0.6257
Lightning               | tables 1 and 6 |     1 |   1 | 33.4985 | 21.9194 | 27.1557 | 10.2285 | 0.6707
DMD2                    | tables 1 and 6 |     1 |   1 | 35.2153 | 22.0978 | 27.4523 | 10.6947 | 0.6715
DMDX                    | tables 1 and 6 |     1 |   1 | 35.2557 | 22.2736 | 27.7046 | 11.1978 | 0.7156
SDXL-Base               | tables 1 and 6 |    25 |  50 | 35.0309 | 22.2494 | 27.3743 | 10.7042 | 0.6936
SD3-Medium TSCD         | table 2        |     4 |   8 | 34.0185 | 21.9665 | 27.2728 | 10.8600 |
SD3-Medium PCM, shift 1 | table 2        |     4 |   4 | 33.5042 | 21.9703 | 27.3680 | 10.5707 |
SD3-Medium Flash        | table 2        |     4 |   4 | 34.3978 | 22.0904 | 27.2586 | 10.6634 |
SD3-Medium ADM          | table 2        |     4 |   4 | 34.9076 | 22.5471 | 28.4492 | 11.9543 |
SD3-Medium              | table 2        |    25 |  50 | 34.7633 | 22.2961 | 27.9733 | 11.3652 |
SD3.5-Large LADD        | table 2        |     4 |   4 | 34.7395 | 22.3958 | 27.4923 | 11.4372 |
SD3.5-Large ADM         | table 2        |     4 |   4 | 34.9730 | 22.8842 | 27.7331 | 12.2350 |
SD3.5-Large             | table 2        |    25 |  50 | 34.9668 | 22.5087 | 27.9688 | 11.5826 |
"""

# paper: table 3, VBench, of a public reading of it. Incomplete: the rows of ADM with classifier-free
# guidance, and those with longer training, are not known here.
VIDEOS = """
system           | table   | steps | nfe | total  | quality | semantic
CogVideoX-2b ADM | table 3 |     8 |   8 | 78.584 |  80.825 |   69.621
CogVideoX-2b     | table 3 |   100 | 200 | 80.036 |  80.801 |   76.974
CogVideoX-5b ADM | table 3 |     8 |   8 | 82.067 |  83.227 |   77.423
CogVideoX-5b     | table 3 |   100 | 200 | 81.226 |  81.785 |   78.987
"""
VBENCH_NOTE = (
    "Of the paper's table 3 the rows with guidance and with longer training are missing here. Whether its "
    "prompts were rewritten, as those of VBench's leaderboard, and whether it took VBench-Long, which its "
    "authors ask for from 5 seconds on, is not known: ours are the prompts as they are, and VBench."
)


def select_rows(measured, args):
    """The paper's rows that have any of the metrics of `measured`, a row of ours, in the form of ours. args:
    of the scorers; numbers of another CLIP or another LPIPS are not compared."""
    measured = dict(measured)
    if (args.clip_model, args.clip_weights, args.clip_prefix) != CLIP:
        measured.pop("clip", None)
    if (args.lpips_net, args.lpips_size) != LPIPS:
        measured.pop("lpips", None)
    rows = []
    for row, scores in read_table(IMAGES):
        known = {name: score for name, score in scores.items() if name in measured}
        if known:
            rows.append(row | known)
    if measured.get("vbench"):
        for row, scores in read_table(VIDEOS):
            rows.append(row | {"vbench": scores})
    return rows


def read_table(text):
    """One of the tables above -> [(row {"system", "steps", "nfe"}, {metric: score})]."""
    heads, *lines = (re.split(r"\s*\|\s*", line.strip()) for line in text.strip().splitlines())
    entries = []
    for name, table, steps, nfe, *scores in lines:
        row = {"system": f"{name} (paper, {table})", "steps": int(steps), "nfe": int(nfe)}
        entries.append((row, {metric: float(score) for metric, score in zip(heads[4:], scores) if score}))
    return entries
