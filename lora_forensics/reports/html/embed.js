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
