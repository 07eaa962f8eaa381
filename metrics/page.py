"""An HTML page, in one file that needs no network, to page through the prompts of two systems."""

import base64
import html
import io
import json
import re

import numpy as np

from support.files import write_text

SHOWN = 200  # prompts: the page holds its images

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>TITLE</title>
<style>
body { font: 16px sans-serif; margin: 2em; text-align: center }
figure { display: inline-block; width: 45%; margin: 1% }
img { width: 100%; image-rendering: pixelated }
td, th { padding: 0 1em }
table { margin: auto }
</style>
<p>
  <button id="back">&larr;</button>
  <span id="place"></span>
  <button id="on">&rarr;</button>
  (or the arrow keys)
</p>
<h2 id="prompt"></h2>
<figure><img id="a"><figcaption id="name-a"></figcaption></figure>
<figure><img id="b"><figcaption id="name-b"></figcaption></figure>
<table id="scores"></table>
<script>
const pages = PAGES, names = NAMES;
const at = id => document.getElementById(id);
let i = 0;

function addRow(cells, kind) {
  const line = at("scores").insertRow();
  for (const text of cells) line.appendChild(document.createElement(kind)).textContent = text;
}

function show() {
  i = Math.min(Math.max(0, parseInt(location.hash.slice(1)) || 0), pages.length - 1);
  const page = pages[i];
  at("place").textContent = `${i + 1} of ${pages.length}`;
  at("prompt").textContent = page.prompt;
  at("a").src = page.a;
  at("b").src = page.b;
  at("name-a").textContent = names[0];
  at("name-b").textContent = names[1];
  at("scores").textContent = "";
  addRow(["", ...names], "th");
  for (const [name, a, b] of page.scores) addRow([name, a, b], "td");
}

function go(n) {
  location.hash = Math.min(Math.max(0, i + n), pages.length - 1);
}

at("back").onclick = () => go(-1);
at("on").onclick = () => go(1);
document.onkeydown = event => {
  if (event.key == "ArrowLeft") go(-1);
  if (event.key == "ArrowRight") go(1);
};
window.onhashchange = show;
show();
</script>
"""


def save_page(a, b, values, prompts, path):
    """The first sample of two systems (metrics.images.Images), with values {system: {metric: [P]}}; of at
    most SHOWN prompts, evenly spaced. #N is prompt N of the page."""
    count = min(SHOWN, len(prompts))
    chosen = np.unique(np.linspace(0, len(prompts) - 1, count).round().astype(int))
    metrics = [name for name in values[a.name] if name in values[b.name]]
    pages = []
    for p in chosen:
        scores = []
        for name in metrics:
            one, other = values[a.name][name][p], values[b.name][name][p]
            if np.isfinite([one, other]).all():  # a prompt that names everything leaves no variety to measure
                scores.append([name, f"{one:.3f}", f"{other:.3f}"])
        pages.append({"prompt": prompts[p], "a": embed(a, p), "b": embed(b, p), "scores": scores})
    parts = {
        "PAGES": json.dumps(pages).replace("<", "\\u003c"),  # no prompt can end the script
        "NAMES": json.dumps([a.name, b.name]).replace("<", "\\u003c"),
        "TITLE": html.escape(f"{a.name} and {b.name}"),
    }
    page = re.sub("TITLE|PAGES|NAMES", lambda match: parts[match[0]], PAGE)
    write_text(path, page)


def embed(images, p):
    """The first sample of prompt p, shrunk to 512 pixels, as an address that holds it; a video moves."""
    frames = images.read_frames(p)
    for frame in frames:
        frame.thumbnail((512, 512))
    first, *others = frames
    buffer = io.BytesIO()
    milliseconds = 1000 // (images.fps or 1)
    first.save(buffer, "WEBP", save_all=True, append_images=others, duration=milliseconds, loop=0, quality=90)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
