"""The page of a report: its own style and script, and where its parts go; the rest is every page's."""

from string import Template

STYLE = """
.bar { height: 6px; margin: 12px 0 20px; border-radius: 3px; background: var(--rule); overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--accent); }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.tiles div, .chart { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px; }
.tiles b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
.charts { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); }
.chart figcaption { min-height: 2.9em; }
.chart output { display: block; min-height: 1.4em; font-size: 13px; color: var(--dim);
  font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
svg text { font-size: 12px; fill: var(--dim); }
.rule { stroke: var(--rule); }
.mark { stroke: var(--dim); stroke-dasharray: 3 4; opacity: .6; }
.cursor { stroke: var(--dim); }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.raw { stroke-width: 1; opacity: .35; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; color: var(--dim); }
.legend i { display: inline-block; width: 10px; height: 10px; margin-right: 5px; border-radius: 2px; }
#samples input { width: 100%; accent-color: var(--accent); }
#samples img { display: block; max-width: 100%; margin: 8px 0 4px; border-radius: 6px; }
#samples figcaption { color: var(--dim); font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule); text-align: left; white-space: nowrap; }
th { color: var(--dim); font-weight: 500; }
pre { overflow-x: auto; padding: 14px; border: 1px solid var(--rule); border-radius: 8px; background: var(--card);
  font-size: 13px; }
summary { cursor: pointer; }
"""

SCRIPT = """
const short = value => Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : +value.toPrecision(4);
for (const chart of document.querySelectorAll(".chart")) {
  const svg = chart.querySelector("svg"), cursor = chart.querySelector(".cursor");
  const read = chart.querySelector("output"), box = svg.viewBox.baseVal;
  const [start, end] = svg.dataset.x.split(" ").map(Number), [low, high] = svg.dataset.y.split(" ").map(Number);
  const [width, height] = svg.dataset.size.split(" ").map(Number);
  const curves = [...chart.querySelectorAll("polyline.curve")].map(line => ({
    name: line.dataset.name,
    points: line.getAttribute("points").split(" ").map(pair => pair.split(",").map(Number)) }));
  const away = () => { cursor.setAttribute("visibility", "hidden"); read.textContent = ""; };
  svg.addEventListener("pointerleave", away);
  svg.addEventListener("pointermove", event => {
    const area = svg.getBoundingClientRect();
    const x = (event.clientX - area.left) / area.width * box.width + box.x;
    const nearest = curves.map(curve => [curve.name, curve.points.reduce(
      (best, point) => Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best)]);
    const at = nearest[0][1][0];
    cursor.setAttribute("visibility", "visible");
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    const value = y => { const v = high - (high - low) * y / height; return svg.dataset.log === "1" ? 10 ** v : v; };
    read.textContent = short(start + (end - start) * at / width) + " pictures: " + nearest.map(
      ([name, point]) => (curves.length > 1 ? name + " " : "") + short(value(point[1]))).join(", ");
  });
}
const slider = document.querySelector("#samples input"), grids = document.querySelectorAll("#samples figure");
slider?.addEventListener("input", () => grids.forEach((grid, place) => { grid.hidden = place !== +slider.value; }));
"""

BODY = Template("""<header>
<h1>$title</h1>
<div class="dim">$phase &middot; $progress &middot; written $written</div>
<div class="bar"><i style="width:$percent"></i></div>
<div class="tiles">$tiles</div>
</header>
<section><h2>Curves</h2>$best<div class="charts">$charts</div>
<p><small>Over pictures seen. A dashed line is where the run was resumed.</small></p></section>
$samples
$plan
$environment
<section><h2>Recipe</h2><details open><summary>recipe.yaml, as resolved</summary><pre>$recipe</pre></details></section>
""")
