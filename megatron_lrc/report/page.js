// Reads values off charts and heat maps under the pointer. The page is whole without it.
"use strict";
const stepsAt = JSON.parse(document.body.dataset.steps);
const short = v => Math.abs(v) >= 1e9 ? +(v / 1e9).toPrecision(4) + "B" : Math.abs(v) >= 1e6 ? +(v / 1e6).toPrecision(4) + "M"
  : Math.abs(v) >= 1e3 ? +(v / 1e3).toPrecision(4) + "K" : String(+v.toPrecision(4));
function stepOf(tokens) {
  let k = 1;
  while (k < stepsAt.length - 1 && stepsAt[k][0] < tokens) k++;
  if (stepsAt.length < 2) return "";
  const [a, b] = [stepsAt[k - 1], stepsAt[k]];
  return ", step " + Math.round(a[1] + (b[1] - a[1]) * (tokens - a[0]) / Math.max(b[0] - a[0], 1)).toLocaleString("en");
}
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) { const mid = (low + high) >> 1; if (xs[mid] < x) low = mid; else high = mid; }
  return x - xs[low] < xs[high] - x ? low : high;
}
function tipOf(figure) {
  const tip = figure.querySelector(".tip") || figure.appendChild(Object.assign(document.createElement("div"), {className: "tip"}));
  tip.replaceChildren();
  tip.add = (text, color) => {
    const row = tip.appendChild(document.createElement("div"));
    if (color !== undefined) row.appendChild(Object.assign(document.createElement("i"), {className: "b" + color}));
    row.append(text);
  };
  return tip;
}
function put(tip, figure, event) {
  const box = figure.getBoundingClientRect(), x = event.clientX - box.left;
  tip.style.left = (x + 14 + tip.offsetWidth < box.width ? x + 14 : x - 14 - tip.offsetWidth) + "px";
  tip.style.top = Math.max(event.clientY - box.top - tip.offsetHeight - 10, 4) + "px";
}
for (const figure of document.querySelectorAll(".chart")) {
  const frame = JSON.parse(figure.dataset.frame), series = JSON.parse(figure.dataset.series);
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor"), width = svg.viewBox.baseVal.width;
  svg.addEventListener("mousemove", event => {
    const box = svg.getBoundingClientRect(), place = (event.clientX - box.left) / box.width;
    const share = Math.min(Math.max((place - frame.l) / (frame.r - frame.l), 0), 1),
      scale = frame.log ? Math.log : v => v, low = scale(frame.x0), span = scale(frame.x1) - low;
    const x = frame.log ? Math.exp(low + share * span) : low + share * span;
    const at = series[0].x[nearest(series[0].x, x)], screen = (frame.l + (scale(at) - low) / span * (frame.r - frame.l)) * width;
    cursor.setAttribute("x1", screen); cursor.setAttribute("x2", screen); cursor.style.visibility = "visible";
    const tip = tipOf(figure);
    tip.add(frame.x === "tokens" ? short(at) + " tokens" + stepOf(at) : frame.x + " " + at);
    for (const s of series) if (s.x[0] <= at && at <= s.x.at(-1)) tip.add(s.n + " " + +s.y[nearest(s.x, at)].toPrecision(5), s.c);
    put(tip, figure, event);
  });
  svg.addEventListener("mouseleave", () => { cursor.style.visibility = "hidden"; figure.querySelector(".tip")?.remove(); });
}
for (const figure of document.querySelectorAll(".heat")) {
  const frame = JSON.parse(figure.dataset.frame), levels = atob(figure.dataset.levels), image = figure.querySelector(".map img");
  image.addEventListener("mousemove", event => {
    const box = image.getBoundingClientRect();
    const column = Math.min(Math.floor((event.clientX - box.left) / box.width * frame.w), frame.w - 1);
    const layer = Math.min(Math.floor((event.clientY - box.top) / box.height * frame.h), frame.h - 1);
    const level = levels.charCodeAt(layer * frame.w + column), tip = tipOf(figure);
    const tokens = frame.x0 + (frame.x1 - frame.x0) * (column + .5) / frame.w;
    tip.add("layer " + layer + ", " + short(tokens) + " tokens" + stepOf(tokens));
    tip.add(level === 255 ? "off" : "about " + +(10 ** (frame.lo + (frame.hi - frame.lo) * level / 254)).toPrecision(2));
    put(tip, figure, event);
  });
  image.addEventListener("mouseleave", () => figure.querySelector(".tip")?.remove());
}
