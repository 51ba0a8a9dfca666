"""The page of a picture's maps: a word that is pointed at lights its pixels, and a slider walks through the steps.

Each map's frames, the mean first, stand one below the other in a grey PNG at the latents' size; the page colours them.
"""

# Shapes: T steps, W maps, H W height and width.

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from string import Template
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from .overlays import OPACITY, levels, ramp
from .page import page, png_uri

MOST_FRAMES = 60  # steps that the slider goes through
MOST_SIDE = 768  # pixels of a side that the page colours anew at every word

STYLE = f"""
.sides {{ display: grid; gap: 20px 32px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr));
  margin-top: 18px; align-items: start; }}
.stage {{ position: relative; border-radius: 8px; overflow: hidden; background: var(--card); touch-action: pan-y; }}
.stage img, .stage canvas {{ display: block; width: 100%; height: auto; }}
.stage canvas {{ position: absolute; inset: 0; height: 100%; opacity: 0; }}
.stage i {{ position: absolute; width: 14px; height: 14px; margin: -7px; border: 2px solid #fff; border-radius: 50%;
  box-shadow: 0 0 0 1px #000; }}
.lit img {{ filter: grayscale(1); }}
.lit canvas {{ opacity: {OPACITY}; }}
figcaption {{ min-height: 4.6em; margin-top: 8px; font-variant-numeric: tabular-nums; }}
figcaption output {{ display: block; }}
h2 {{ margin: 0 0 8px; font-size: 15px; font-weight: 600; }}
.names {{ display: flex; flex-wrap: wrap; gap: 8px; margin-bottom: 18px; }}
button {{ min-height: 44px; padding: 8px 14px; border: 1px solid var(--rule); border-radius: 8px; color: inherit;
  background: var(--card); font: inherit; cursor: pointer; overflow-wrap: anywhere; }}
button:hover, button:focus-visible {{ border-color: var(--accent); outline: 2px solid var(--accent); }}
button[aria-pressed=true] {{ border-color: var(--accent); background: var(--accent); color: var(--page); }}
button[aria-pressed=true] small {{ color: inherit; }}
input {{ display: block; width: 100%; min-height: 32px; accent-color: var(--accent); }}
.scale {{ display: flex; align-items: center; gap: 10px; margin: 16px 0; }}
.scale img {{ flex: 1; min-width: 0; height: 14px; border-radius: 4px; image-rendering: pixelated; }}
"""

SCRIPT = """
const stage = document.querySelector(".stage"), slider = document.querySelector("#step");
const mark = stage.querySelector("i"), said = document.querySelector("#said"), here = document.querySelector("#here");
const canvas = stage.querySelector("canvas"), paint = canvas.getContext("2d", { willReadFrequently: true });
const buttons = [...document.querySelectorAll("button")], frames = slider.dataset.frames.split(" ");
const apart = name => "\\u2068" + name + "\\u2069";  // its direction is its own
const percent = share => (share >= 0.0995 ? Math.round(100 * share) : +(100 * share).toPrecision(2)) + " %";
let maps = [], colours, pinned = null, shown = null;

const pixels = image => {
  const sheet = document.createElement("canvas");
  sheet.width = image.naturalWidth;
  sheet.height = image.naturalHeight;
  const context = sheet.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return { sheet, data: context.getImageData(0, 0, sheet.width, sheet.height).data };
};
const draw = () => {
  const frame = +slider.value, button = shown ?? pinned;
  document.querySelector("#when").textContent = frames[frame] === "0" ? "mean of all" : "step " + frames[frame];
  for (const [number, each] of buttons.entries())
    each.querySelector("small").textContent = percent(maps[number].most[frame]);
  stage.classList.toggle("lit", button !== null);
  mark.hidden = button?.dataset.kind !== "pixel";
  if (button === null) {
    said.textContent = "Point at a word, or tap it.";
    return;
  }
  const map = maps[buttons.indexOf(button)], height = map.sheet.height / frames.length;
  paint.drawImage(map.sheet, 0, frame * height, map.sheet.width, height, 0, 0, canvas.width, canvas.height);
  const image = paint.getImageData(0, 0, canvas.width, canvas.height), data = image.data;
  for (let at = 0; at < data.length; at += 4) {
    const level = 4 * data[at];
    data[at] = colours[level];
    data[at + 1] = colours[level + 1];
    data[at + 2] = colours[level + 2];
  }
  paint.putImageData(image, 0, 0);
  mark.style.left = 100 * button.dataset.right + "%";
  mark.style.top = 100 * button.dataset.down + "%";
  document.querySelector("#most").textContent = percent(map.most[frame]);
  said.textContent = apart(button.dataset.name) + ": " + (button.dataset.kind === "pixel" ?
    "most on one pixel, " + percent(map.most[frame]) + " of its attention" :
    "at most " + percent(map.most[frame]) + " of a pixel's attention, " + percent(map.mean[frame]) + " on average");
};
const show = button => { shown = button; draw(); };
addEventListener("load", () => {
  colours = pixels(document.querySelector(".scale img")).data;
  maps = buttons.map(button => ({ ...pixels(button.querySelector("img")),
    most: button.dataset.most.split(" ").map(Number), mean: button.dataset.mean.split(" ").map(Number) }));
  draw();
});
for (const [number, button] of buttons.entries()) {
  button.addEventListener("pointerenter", event => { if (event.pointerType !== "touch") show(button); });
  button.addEventListener("pointerleave", () => show(null));
  button.addEventListener("focus", () => { if (button.matches(":focus-visible")) show(button); });
  button.addEventListener("blur", () => show(null));
  button.addEventListener("click", () => {
    pinned = pinned === button ? null : button;
    for (const each of buttons) each.setAttribute("aria-pressed", each === pinned);
    draw();
  });
  button.addEventListener("keydown", event => {
    const way = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (way === undefined) return;
    event.preventDefault();
    buttons[(number + way + buttons.length) % buttons.length].focus();
  });
}
slider.addEventListener("input", draw);
stage.addEventListener("pointerleave", () => { here.textContent = ""; });
stage.addEventListener("pointermove", event => {
  const area = stage.getBoundingClientRect(), frame = +slider.value;
  const share = (at, start, size) => Math.min(Math.max((at - start) / size, 0), 1 - 1e-9);
  const right = share(event.clientX, area.left, area.width), down = share(event.clientY, area.top, area.height);
  const found = buttons.map((button, number) => {
    const map = maps[number], width = map.sheet.width, height = map.sheet.height / frames.length;
    const at = (frame * height + Math.floor(down * height)) * width + Math.floor(right * width);
    return [button, map.data[4 * at] / 255 * map.most[frame]];
  }).filter(([button]) => button.dataset.kind === "word").sort((a, b) => b[1] - a[1]).slice(0, 3);
  here.textContent = found.length === 0 ? "" :
    "Here: " + found.map(([button, value]) => apart(button.dataset.name) + " " + percent(value)).join(", ");
});
"""

BODY = Template("""<header>
<h1>$title</h1>
<div class="dim">$about</div>
</header>
<main class="sides">
<figure>
<div class="stage"><img src="$picture" alt="the picture"><canvas width="$width" height="$height"></canvas><i hidden></i>
</div>
<figcaption><output id="said" aria-live="polite"></output><output id="here" class="dim"></output></figcaption>
</figure>
<div>
$groups
<label for="step"><b>Steps</b> <output id="when"></output></label>
<input id="step" type="range" min="0" max="$last" value="0" data-frames="$frames">
<div class="scale"><small>0</small><img src="$ramp" alt="the scale of colours, from nothing to the most">
<small id="most">the most</small></div>
<p><small>Each map has its own scale: its brightest colour is the most that one pixel gives, which stands beside the
name. Over all words and special tokens a pixel gives 100&#8239;%. Arrow keys go from name to name, Enter keeps one
lit.</small></p>
</div>
</main>
""")


class Entry(NamedTuple):
    """One thing to point at. kind: "word", "special" or "pixel". frames_THW: its maps at the latents' size, the mean
    over the steps first. place: of a pixel, its shares of width and height."""

    name: str
    kind: str
    frames_THW: Tensor
    place: tuple[float, float] = (0.0, 0.0)


def render(title: str, about: Sequence[str], image: Image.Image, entries: Sequence[Entry], steps: Sequence[int]) -> str:
    """The page. about: lines below the title. steps: the numbers of those that have frames of their own; of many, some
    are shown, evenly over the run."""
    last = len(steps) - 1
    chosen = sorted({round(place * last / (MOST_FRAMES - 1)) for place in range(MOST_FRAMES)}) if steps else []
    frames = [0, *(1 + place for place in chosen)]
    groups = []
    for kind, heading in (("word", "Words"), ("special", "Special tokens"), ("pixel", "Pixels")):
        buttons = [_button(entry, entry.frames_THW[frames]) for entry in entries if entry.kind == kind]
        if buttons:
            groups.append(f'<h2>{heading}</h2>\n<div class="names">{"".join(buttons)}</div>')
    scale = min(1.0, MOST_SIDE / max(image.size))
    body = BODY.substitute(
        title=escape(title),
        about="<br>".join(map(escape, about)),
        picture=png_uri(_png(image)),
        width=max(1, round(image.width * scale)),
        height=max(1, round(image.height * scale)),
        groups="\n".join(groups),
        last=len(chosen),
        frames=" ".join(map(str, [0, *(steps[place] for place in chosen)])),
        ramp=png_uri(_png(Image.fromarray(ramp()[None]))),
    )
    return page(escape(title), STYLE, body, SCRIPT)


def _button(entry: Entry, frames_THW: Tensor) -> str:
    """The frames one below the other, each in levels of its own most, which is told beside them as the mean is."""
    content = _png(Image.fromarray(np.concatenate([levels(frame_HW) for frame_HW in frames_THW])))
    most, mean = (_numbers(values_T) for values_T in (frames_THW.amax((1, 2)), frames_THW.mean((1, 2))))
    right, down = entry.place
    return (
        f'<button type="button" aria-pressed="false" data-kind="{entry.kind}" data-name="{escape(entry.name)}" '
        f'data-most="{most}" data-mean="{mean}" data-right="{right:.4f}" data-down="{down:.4f}">'
        f'<bdi>{escape(entry.name)}</bdi> <small></small><img hidden alt="" src="{png_uri(content)}"></button>\n'
    )


def _numbers(values_T: Tensor) -> str:
    return " ".join(f"{value:.4g}" for value in values_T.tolist())


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return content.getvalue()
