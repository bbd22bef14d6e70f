// draws the charts, names their points without overlaps, and gives table cells the names that small screens show beside them
const specs = JSON.parse(document.getElementById("specs").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)").matches;

for (const table of document.querySelectorAll("table")) {
  const names = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
  for (const row of table.tBodies[0].rows) for (const cell of row.cells) cell.dataset.label = names[cell.cellIndex];
}

const pen = document.createElement("canvas").getContext("2d");
pen.font = "12px system-ui, sans-serif";
const HEIGHT = 16;

function overlap(a, b) {
  const x = Math.min(a.x + a.w, b.x + b.w) - Math.max(a.x, b.x);
  const y = Math.min(a.y + a.h, b.y + b.h) - Math.max(a.y, b.y);
  return x > 0 && y > 0 ? x * y : 0;
}

// where a label of width w may stand beside a point: eight directions, ever farther away
function* places(point, w) {
  for (const far of [11, 22, 36, 54, 76, 102, 132]) {
    for (const [dx, dy] of [[1, 0], [0, -1], [0, 1], [-1, 0], [1, -1], [1, 1], [-1, -1], [-1, 1]]) {
      const x = point.x + dx * far - (dx < 0 ? w : dx ? 0 : w / 2);
      const y = point.y + dy * far - (dy < 0 ? HEIGHT : dy ? 0 : HEIGHT / 2);
      yield { x, y, w, h: HEIGHT, far };
    }
  }
}

// the place that covers nothing taken, lies inside the chart and is near; lines may be covered where nothing else is left
function best(options, taken, lines, width, height) {
  let found = null, least = Infinity;
  for (const box of options) {
    const outside = Math.max(0, -box.x) + Math.max(0, box.x + box.w - width) + Math.max(0, -box.y) + Math.max(0, box.y + box.h - height);
    let cost = (box.far || 0) + 1e4 * outside;
    for (const other of taken) cost += overlap(box, other) ? 1e3 + overlap(box, other) : 0;
    for (const line of lines) cost += overlap(box, line) ? 30 : 0;
    if (cost < least) { least = cost; found = box; }
  }
  return found;
}

function nameThePoints(view, { across, floor, gate }) {
  const width = view.width(), height = view.height(), x = view.scale("x"), y = view.scale("y");
  const points = view.data("points").map((d) => ({ d, x: x(d[across]), y: y(d.quality) }));
  const taken = points.map((p) => ({ x: p.x - 8, y: p.y - 8, w: 16, h: 16 }));
  const lines = points.flatMap(({ d, x: px, y: py }) => [
    { x: x(d[`${across}_low`]), y: py - 1, w: x(d[`${across}_high`]) - x(d[`${across}_low`]), h: 2 },
    { x: px - 1, y: Math.min(y(d.quality_low), y(d.quality_high)), w: 2, h: Math.abs(y(d.quality_low) - y(d.quality_high)) },
  ]);
  const labels = [], leaders = [];
  if (floor !== null) {
    const w = pen.measureText(gate).width + 4, at = y(floor);
    const options = [width - w - 2, (width - w) / 2, 4].flatMap((left) => [at - HEIGHT - 2, at + 2].map((top) => ({ x: left, y: top, w, h: HEIGHT })));
    const box = best(options, taken, lines, width, height);
    taken.push(box);
    lines.push({ x: 0, y: at - 1, w: width, h: 2 });
    labels.push({ text: gate, x: box.x + 2, y: box.y + HEIGHT / 2 });
  }
  for (const p of points.sort((a, b) => a.x - b.x)) {
    const w = pen.measureText(p.d.name).width + 6;
    const box = best(places(p, w), taken, lines, width, height);
    taken.push(box);
    labels.push({ text: p.d.name, x: box.x + 3, y: box.y + HEIGHT / 2 });
    if (box.far > 22) {
      const end = { x: Math.min(Math.max(p.x, box.x), box.x + w), y: Math.min(Math.max(p.y, box.y), box.y + HEIGHT) };
      leaders.push({ x: p.x, y: p.y, x2: end.x, y2: end.y });
    }
  }
  return view.data("labels", labels).data("leaders", leaders).runAsync();
}

// returns what takes the chart away again
async function draw(name, spec) {
  const options = { renderer: "svg", actions: false, ast: false, tooltip: { theme: dark ? "dark" : "light" } };
  const { view, finalize } = await vegaEmbed(document.getElementById(`chart-${name}`), spec, options);
  if (spec.usermeta) await nameThePoints(view, spec.usermeta);
  return finalize;
}

// charts with names are drawn anew in a window of another size: names at their old places would count as part of the chart
const named = new Map();
let waiting;
addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(async () => {
    for (const [name, finalize] of named) {
      finalize();
      named.set(name, await draw(name, specs[name]));
    }
  }, 100);
});

for (const choice of document.querySelectorAll(".switch input")) {
  choice.addEventListener("change", () => {
    for (const figure of choice.closest(".either").querySelectorAll("figure")) figure.classList.toggle("off", figure.dataset.across !== choice.value);
  });
}

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));

Promise.all(Object.entries(specs).map(async ([name, spec]) => {
  const finalize = await draw(name, spec);
  if (spec.usermeta) named.set(name, finalize);
}))
  .catch(console.error)
  .finally(() => { document.documentElement.dataset.ready = "yes"; });
