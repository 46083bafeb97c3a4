"use strict";
document.documentElement.classList.add("script");

const tip = document.getElementById("tip");
const kinds = {
  f: "forward", b: "backward", ta: "send activations", tg: "send gradients", tp: "send parameters", r: "reduce gradients", o: "optimizer",
};

// Own tooltips also open on a tap; the ones of the browser would appear beside them.
for (const e of document.querySelectorAll("[title]")) {
  e.dataset.tip = e.title;
  e.removeAttribute("title");
}

function time(us) {
  const [value, unit] = us >= 1e6 ? [us / 1e6, "s"] : us >= 1e3 ? [us / 1e3, "ms"] : [us, "µs"];
  return `${value.toPrecision(value >= 1000 ? 4 : 3)} ${unit}`;
}

function lines(e) {
  if (e.dataset.tip) return e.dataset.tip.split("\n");
  const [start, end] = e.dataset.t.split(",").map(Number);
  const row = e.closest(".row");
  const who = row.firstChild.innerText.replace(/\s*\n\s*/g, ", ");
  const what = kinds[e.classList[0]] + (e.dataset.m ? ` of microbatch ${e.dataset.m}` : "");
  return [what, who, `${time(end - start)}, from ${time(start)} to ${time(end)}`];
}

// One rule instead of a class on thousands of spans.
const follow = document.head.appendChild(document.createElement("style"));
function show(e, x, y) {
  tip.replaceChildren(...lines(e).map((text) => {
    const line = document.createElement("div");
    line.textContent = text;
    return line;
  }));
  const m = e.dataset.m;
  follow.textContent = m ? `.track i:not([data-m="${Number(m)}"]) { opacity: 0.25 }` : "";
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(x + 12, innerWidth - width - 8))}px`;
  tip.style.top = `${y + 16 + height > innerHeight ? Math.max(8, y - height - 12) : y + 16}px`;
}

function hide() {
  tip.hidden = true;
  follow.textContent = "";
}

function over(event) {
  const e = event.target.closest("[data-tip], .track i");
  if (e) show(e, event.clientX, event.clientY);
  else hide();
}
document.addEventListener("pointermove", over);
document.addEventListener("click", over);
document.addEventListener("scroll", hide, { passive: true, capture: true });
document.addEventListener("keydown", (event) => event.key === "Escape" && hide());

const area = document.querySelector(".tl");
const rows = area && area.firstChild;
let zoom = 1;
for (const button of document.querySelectorAll("[data-zoom]")) {
  button.addEventListener("click", () => {
    const centre = (area.scrollLeft + area.clientWidth / 2) / rows.offsetWidth;
    zoom = Number(button.dataset.zoom) ? Math.min(64, Math.max(1, zoom * Number(button.dataset.zoom))) : 1;
    rows.style.setProperty("--zoom", zoom);
    area.scrollLeft = centre * rows.offsetWidth - area.clientWidth / 2;
  });
}
