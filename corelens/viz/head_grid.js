// the browser's own tooltip from <title> stays where scripts do not run; where they do, a quicker one takes its place
document.querySelectorAll(".cl-grid:not([data-live])").forEach((grid) => {
  grid.dataset.live = 1;
  const tip = grid.querySelector(".tip");
  grid.querySelectorAll("rect").forEach((cell) => {
    const title = cell.querySelector("title");
    const said = title.textContent;
    cell.setAttribute("aria-label", said);
    title.remove();
    cell.addEventListener("pointerenter", () => {
      const at = cell.getBoundingClientRect(), all = grid.getBoundingClientRect();
      tip.textContent = said;
      tip.hidden = false;
      const half = tip.offsetWidth / 2;
      tip.style.left = Math.max(half, Math.min(all.width - half, at.left - all.left + at.width / 2)) + "px";
      tip.style.top = at.top - all.top - 6 + "px";
    });
    cell.addEventListener("pointerleave", () => { tip.hidden = true; });
  });
});
