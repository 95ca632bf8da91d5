"use strict";
// Vega names and describes the element that it draws in: one inside of ours, so that ours keeps its words
const drawInside = async (element, spec, datasets, options) => {
  const inside = element.firstElementChild || element.appendChild(document.createElement("div"));
  const quiet = { actions: false, ast: true, defaultStyle: false, renderer: "svg", tooltip: false, patch: [], logLevel: 1 };
  const { view } = await vegaEmbed(inside, { ...spec, datasets }, { ...quiet, ...options });
  inside.querySelectorAll("[role]").forEach((part) => part.removeAttribute("role"));
  for (const name of ["role", "aria-label", "aria-roledescription"]) inside.removeAttribute(name);
  inside.setAttribute("aria-hidden", "true");
  return view;
};
const shown = (v) => {
  if (v === null || v === undefined || v === "") return "–";
  if (typeof v !== "number" || (Number.isInteger(v) && Math.abs(v) < 1e9)) return String(v);
  const short = Math.abs(v) >= 1e-3 && Math.abs(v) < 1e7;
  return short || v === 0 ? String(Number(v.toPrecision(4))) : v.toExponential(2).replace("+", "");
};
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
tip.setAttribute("aria-hidden", "true");
document.body.append(tip);
const tell = (lines, event) => {
  tip.textContent = lines.join("\n");
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 4))}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 4))}px`;
};
