// tooltips for the cells of [data-tips]; the browser's own, from <title>, stay where scripts do not run
document.querySelectorAll("[data-tips]:not([data-live])").forEach((view) => {
  view.dataset.live = 1;
  const tip = view.querySelector(".tip"), slider = view.querySelector("input[type=range]");
  view.querySelectorAll("rect").forEach((cell) => {
    const title = cell.querySelector("title");
    if (!title) return;
    const said = title.textContent;
    cell.setAttribute("aria-label", said);
    title.remove();
    cell.addEventListener("pointerenter", () => {
      const at = cell.getBoundingClientRect(), all = view.getBoundingClientRect();
      tip.textContent = said;
      tip.hidden = false;
      const half = tip.offsetWidth / 2;
      tip.style.left = Math.max(half, Math.min(all.width - half, at.left - all.left + at.width / 2)) + "px";
      tip.style.top = at.top - all.top - 6 + "px";
    });
    cell.addEventListener("pointerleave", () => { tip.hidden = true; });
  });
  if (slider) {
    const show = () => {
      view.querySelectorAll("g[data-step]").forEach((g) => { g.style.display = g.dataset.step === slider.value ? "" : "none"; });
      view.querySelector(".now").textContent = slider.dataset.labels.split(",")[slider.value];
    };
    slider.addEventListener("input", show);
    show();
  }
});
