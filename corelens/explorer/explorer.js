// The explorer: one picture (or pages, frames), the text's tokens, and the layer × head grid. No library, no request.
// The legends are in legend.js, which is a part of the same script.
// `corelensExplorer(root, data, live)` draws into `root`. `live` is null on a page; in a notebook it has send(message).

const decode = (text, type) => {
  const raw = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new type(raw.buffer);
};
const element = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
};
const percent = (x) => (x === null || Number.isNaN(x) ? "–" : x < 0.0995 ? (100 * x).toFixed(1) + "%" : Math.round(100 * x) + "%");

function corelensExplorer(root, data, live = null) {
  const [L, H] = data.shape;
  const nRows = data.tokens.filter((token) => token.row >= 0).length;
  const mass = {};
  for (const name of ["region", "picture"]) {
    const stored = decode(data.mass[name], Uint16Array);
    mass[name] = (row, head) => (stored[row * L * H + head] === 65535 ? NaN : stored[row * L * H + head] / 65534);
  }
  const bytes = decode(data.maps.bytes, Uint8Array), peaks = decode(data.maps.peak, Float32Array);
  const nHeads = data.heads.length, V = data.maps.visual, K = nHeads ? bytes.length / (nRows * nHeads) : V;
  const stored = new Map(data.heads.map(([layer, head], i) => [layer * H + head, i]));
  const read = (row, head, key) => {
    const i = stored.get(head);
    if (i === undefined) return NaN;
    const q = bytes[(row * nHeads + i) * K + key] / 255;
    return peaks[row * nHeads + i] * q * q;
  };
  const hasRegion = data.region.length > 0, hasViews = data.views.length > 0;
  const rowsOf = (part) => data.tokens.filter((token) => token.row >= 0 && token.part === part).map((token) => token.row);
  const questionRows = rowsOf("question");
  const groups = { question: questionRows, last: data.tokens.filter((t) => t.row >= 0 && t.predicts).map((t) => t.row).slice(0, 1) };
  if (!groups.last.length) groups.last = [nRows - 1];

  // What is looked at now. `rows` is "question" (their mean), "last", or one row's number; `by` is what colours the grid.
  const state = { asked: data.question, rows: "last", head: null, pins: data.pinned.map(([layer, head]) => layer * H + head), by: hasRegion ? "region" : "picture",
                  box: null, patch: null, own: false };

  const rowList = () => (typeof state.rows === "number" ? [state.rows] : groups[state.rows]);
  const over = (value) => { const rows = rowList(); return rows.reduce((sum, row) => sum + value(row), 0) / rows.length; };
  const attention = (head, key) => over((row) => read(row, head, key));
  const means = new Float32Array(K);
  function meansOf(head) {  // a kept head's attention on every key, mean over the rows that are looked at; reused
    const rows = rowList(), i = stored.get(head);
    means.fill(0);
    for (const row of rows) {
      const first = (row * nHeads + i) * K, unit = peaks[row * nHeads + i] / 65025 / rows.length;
      for (let key = 0; key < K; key++) means[key] += unit * bytes[first + key] * bytes[first + key];
    }
    return means;
  }
  const touched = (box) => {
    const keys = new Set();
    data.views[box.view].cells.forEach(([x0, y0, x1, y1], i) => {
      if (Math.min(x1, box.x1) > Math.max(x0, box.x0) && Math.min(y1, box.y1) > Math.max(y0, box.y0)) keys.add(data.views[box.view].keys[i]);
    });
    return [...keys];
  };
  let boxKeys = [];
  const values = {
    region: { label: "attention on the evidence", of: (head) => over((row) => mass.region(row, head)) },
    picture: { label: "attention on the picture", of: (head) => over((row) => mass.picture(row, head)) },
    box: { label: "attention on your box", of: (head) => boxKeys.reduce((sum, key) => sum + attention(head, key), 0) },
    patch: { label: "attention on the patch", of: (head) => attention(head, state.patch) },
  };
  if (!hasRegion) delete values.region;
  for (const [name, table] of Object.entries(data.scores))
    values["score:" + name] = { label: "score " + name, of: (head) => table[Math.floor(head / H)][head % H] ?? NaN };
  // It opens at the token from which some head looks hardest at the evidence: one of the question's, or the last.
  let hardest = -1, opensAt = "last";
  for (const rows of ["last", ...(hasRegion ? questionRows : questionRows.length ? ["question"] : [])]) {
    state.rows = rows;
    const highest = Math.max(...Array.from({ length: L * H }, (_, head) => values[state.by].of(head) || 0));
    if (highest > hardest) { hardest = highest; opensAt = rows; }
  }
  state.rows = opensAt;
  const nameOf = (head) => `L${Math.floor(head / H)}H${head % H}`;

  // --- the frame ---------------------------------------------------------------------------------------------------
  root.classList.add("cl-explorer");
  root.replaceChildren();
  const answerLine = element("p", { class: "answer" });
  const chips = element("div", { class: "chips", role: "listbox", "aria-label": "tokens" });
  const views = element("div", { class: "views" });
  const reading = element("p", { class: "reading", role: "status" });
  const grid = element("div", { class: "grid", role: "grid", "aria-label": `${L} layers by ${H} heads`, style: `--heads:${H}` });
  const choose = element("select", { "aria-label": "what colours the grid", title: "What the colour of a head's square means", onchange: () => { state.by = choose.value; draw(); } });
  const ofPictures = pictureLegend(hasRegion), ofGrid = gridLegend();
  const ranking = element("ol", { class: "ranking" });
  const pinned = element("div", { class: "pinned" });
  const play = element("button", { type: "button", title: "The answer's tokens one after the other, each with what the token before it looks at",
    onclick: () => playAnswer() }, "▶ play the answer");
  const ownScale = element("input", { type: "checkbox", onchange: () => { state.own = ownScale.checked; draw(); } });
  const sources = [["question", "question's tokens (mean)", "What the question's tokens look at, on average: the rows of RAM as published"],
                   ["last", "last token (predicts the answer)", "What the last token of the prompt looks at (the last row): the answer's first token is predicted from it"]];
  const patchList = element("div", { class: "patch", hidden: "" });
  root.append(
    element("header", {}, element("p", { class: "question" }, data.question || data.id), answerLine),
    live ? liveControls() : "",
    element("div", { class: "tokens" },
      element("div", { class: "groups" }, element("span", { class: "hint" }, "Attention from:"),
        ...sources.filter(([name]) => groups[name].length).map(([name, label, title]) =>
          element("button", { type: "button", "data-rows": name, title, onclick: () => { state.rows = name; draw(); } }, label)), play,
        element("span", { class: "hint" }, "or click a token:")),
      chips),
    element("div", { class: "stage" },
      element("section", {}, reading,
        hasViews ? ofPictures.node : "",
        views, patchList,
        hasViews ? element("p", { class: "hint" }, "Click a patch: which heads look at it. Drag a box: how much falls into it. ",
          element("label", { title: "Stretch each head's map to full colour, so that faint ones are seen; heads can then not be compared" },
            ownScale, "each head on a scale of its own")) : ""),
      element("section", { class: "heads" },
        element("div", { class: "bar" }, element("span", {}, "Colour:"), choose, ofGrid.node),
        element("div", { class: "scroll" }, grid),
        element("p", { class: "hint" }, "One square is one head: layers downwards, heads across. Point at it, or use the arrow keys: see where it looks. Click, or Enter: pin it."),
        element("p", { class: "hint" }, "Highest:"), ranking)),
    element("h3", { class: "pins-title" }, "Pinned heads"), pinned,
    data.left_out.length ? element("p", { class: "left-out" }, "Left out: " + data.left_out.join(" ")) : "",
  );

  // --- tokens ------------------------------------------------------------------------------------------------------
  const chipOf = new Map();
  data.tokens.forEach((token, i) => {
    const shown = token.text.replace(/\n/g, "⏎").replace(/^ | $/g, "·") || "·";
    const chip = element("button", { type: "button", class: "chip is-" + token.part, role: "option", disabled: token.row < 0 ? "" : null,
      title: token.row < 0 ? "before the picture: it cannot look at it" : `what this token looks at (row ${i})` }, shown);
    if (token.row >= 0) { chip.addEventListener("click", () => { state.rows = token.row; draw(); }); chipOf.set(token.row, chip); }
    token.chip = chip;
    chips.append(chip);
  });

  // --- pictures ----------------------------------------------------------------------------------------------------
  const canvases = data.views.map((view, number) => {
    const picture = element("img", { src: view.src, alt: view.label, draggable: "false", onload: () => drawPins() });
    const canvas = element("canvas", { "aria-label": "attention on " + view.label, tabindex: "0" });
    const scale = Math.min(1, 720 / Math.max(...view.size));
    canvas.width = Math.max(1, Math.round(view.size[0] * Math.max(scale, Math.min(2, 360 / Math.max(...view.size)))));
    canvas.height = Math.max(1, Math.round(canvas.width * view.size[1] / view.size[0]));
    let start = null;
    const at = (event) => {
      const area = canvas.getBoundingClientRect();
      return { x: (event.clientX - area.left) / area.width * view.size[0], y: (event.clientY - area.top) / area.height * view.size[1] };
    };
    canvas.addEventListener("pointerdown", (event) => { start = at(event); canvas.setPointerCapture(event.pointerId); });
    canvas.addEventListener("pointermove", (event) => {
      const now = at(event);
      if (!start) return hover(number, now);
      state.box = { view: number, x0: Math.max(0, Math.min(start.x, now.x)), y0: Math.max(0, Math.min(start.y, now.y)),
                    x1: Math.min(view.size[0], Math.max(start.x, now.x)), y1: Math.min(view.size[1], Math.max(start.y, now.y)) };
      paint(number);
    });
    canvas.addEventListener("pointerup", (event) => {
      const end = at(event), far = start && Math.hypot(end.x - start.x, end.y - start.y) > 0.02 * Math.max(...view.size);
      start = null;
      if (far) { boxKeys = touched(state.box); state.by = "box"; if (live) live.send({ box: { ...state.box, image: view.image, frame: view.frame } }); }
      else { state.box = null; const key = keyAt(number, end); if (key !== null) { state.patch = key; state.by = "patch"; } }
      draw();
    });
    views.append(element("figure", {}, element("div", { class: "picture" }, picture, canvas), data.views.length > 1 ? element("figcaption", {}, view.label) : null));
    return canvas;
  });
  if (!hasViews) views.append(element("p", { class: "hint" }, "Where this model's pictures lie among its tokens is not known: attention on text is shown."));

  function keyAt(number, point) {  // the finest visual token below a point
    let best = null, area = Infinity;
    data.views[number].cells.forEach(([x0, y0, x1, y1], i) => {
      const size = (x1 - x0) * (y1 - y0);
      if (point.x >= x0 && point.x < x1 && point.y >= y0 && point.y < y1 && size < area) { area = size; best = data.views[number].keys[i]; }
    });
    return best;
  }
  function hover(number, point) {
    const key = keyAt(number, point);
    if (key === null || state.head === null) return;
    reading.textContent = `${nameOf(state.head)} puts ${percent(attention(state.head, key))} on this patch` + (data.region.includes(key) ? " (evidence)" : "");
  }
  const smallestCell = data.views.map((view) => view.cells.reduce((smallest, [x0, y0, x1, y1]) => {
    const a = (x1 - x0) * (y1 - y0);
    return a > 0 ? Math.min(smallest, a) : smallest;
  }, Infinity));
  // What of a small drawing each visual token covers, and the weight that makes its attention a density.
  const drawn = data.views.map((view, number) => {
    const width = Math.min(160, Math.round(view.size[0])), height = Math.max(1, Math.round(width * view.size[1] / view.size[0]));
    const k = width / view.size[0], patches = [];
    view.cells.forEach(([x0, y0, x1, y1], i) => {
      const a = (x1 - x0) * (y1 - y0), left = Math.round(x0 * k), top = Math.round(y0 * k);
      if (!(a > 0)) return;
      patches.push({ key: view.keys[i], weight: smallestCell[number] / a, left: Math.max(0, left), top: Math.max(0, top),
                     right: Math.min(width, Math.max(left + 1, Math.round(x1 * k))), bottom: Math.min(height, Math.max(top + 1, Math.round(y1 * k))) });
    });
    const small = new OffscreenCanvas(width, height), image = new ImageData(width, height);
    return { width, height, patches, small, image, pixels: new Uint32Array(image.data.buffer) };
  });
  // Attention as density, so that overlapping views (tile and thumbnail) add up; one colour, stronger where there is more.
  function heat(number, head) {
    const { width, height, patches } = drawn[number], field = new Float32Array(width * height), on = meansOf(head);
    let peak = 0;
    for (const { key, weight, left, top, right, bottom } of patches) {
      const value = on[key] * weight;
      for (let y = top; y < bottom; y++)
        for (let x = y * width + left; x < y * width + right; x++) { field[x] += value; if (field[x] > peak) peak = field[x]; }
    }
    return { number, field, peak };
  }
  // Faded where nobody looks, its own colours under a light wash of orange where attention falls: seen without colour, too.
  const hue = new Uint32Array(256), painted = new Uint8Array(hue.buffer);
  for (let level = 0; level < 256; level++) {
    const veil = 0.5 * (1 - level / 255), cover = 0.6 * (level / 255) ** 0.7, alpha = 1 - (1 - veil) * (1 - cover);
    const mixed = [213, 94, 0].map((part) => Math.round((255 * veil * (1 - cover) + part * cover) / alpha));
    painted.set([...mixed, Math.round(255 * alpha)], 4 * level);
  }
  function wash(context, { number, field }, peak, full) {
    const { width, height, pixels, image, small } = drawn[number], k = 255 / peak;
    for (let i = 0; i < field.length; i++) pixels[i] = hue[Math.min(255, Math.round(field[i] * k))];
    small.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, width, height, 0, 0, full.width, full.height);
  }
  const peakOf = (maps) => Math.max(1e-9, ...maps.map(({ peak }) => peak));
  function outline(context, box, k, colour, dash = []) {
    const [x0, y0, x1, y1] = box.map((x) => x * k);
    for (const [style, width] of [["#000000b0", 4], [colour, 2]]) {
      context.strokeStyle = style; context.lineWidth = width; context.setLineDash(dash);
      context.strokeRect(x0 + 1, y0 + 1, x1 - x0 - 2, y1 - y0 - 2);
    }
    context.setLineDash([]);
  }
  // The density of the densest patch of all heads kept, from the rows shown: the one scale on which heads are compared.
  let scaleRows = null, scalePeak = 1;
  function peakOfAll() {
    if (scaleRows === state.rows) return scalePeak;
    const weights = new Float32Array(K);
    drawn.forEach(({ patches }) => { for (const { key, weight } of patches) weights[key] = Math.max(weights[key], weight); });
    scalePeak = 1e-9;
    for (const head of stored.keys()) {
      const on = meansOf(head);
      for (let key = 0; key < V; key++) scalePeak = Math.max(scalePeak, on[key] * weights[key]);
    }
    scaleRows = state.rows;
    return scalePeak;
  }
  let shown = [], sharedPeak = 1;
  function paint(number) {
    const view = data.views[number], canvas = canvases[number], context = canvas.getContext("2d"), k = canvas.width / view.size[0];
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (shown[number]) wash(context, shown[number], sharedPeak, canvas);
    view.outlines.forEach((box) => outline(context, box, k, "#fff"));
    if (state.by === "patch" && state.patch !== null) {
      const i = view.keys.indexOf(state.patch);
      if (i >= 0) outline(context, view.cells[i], k, "#56b4e9");
    }
    if (state.box && state.box.view === number) outline(context, [state.box.x0, state.box.y0, state.box.x1, state.box.y1], k, "#56b4e9", [6, 4]);
  }

  // --- the grid ----------------------------------------------------------------------------------------------------
  const cells = Array.from({ length: L * H }, (_, head) => {
    const cell = element("button", { type: "button", role: "gridcell", tabindex: "-1", "data-head": head });
    return cell;
  });
  for (let layer = 0; layer < L; layer++) {
    grid.append(element("span", { class: "axis" }, layer % (L > 16 ? 4 : 2) === 0 ? String(layer) : ""), ...cells.slice(layer * H, (layer + 1) * H));
  }
  const cellOf = (event) => { const cell = event.target.closest("[data-head]"); return cell ? Number(cell.dataset.head) : null; };
  grid.addEventListener("pointerover", (event) => { const head = cellOf(event); if (head !== null && event.pointerType !== "touch") select(head); });
  grid.addEventListener("click", (event) => { const head = cellOf(event); if (head !== null) { select(head); pin(head); } });
  grid.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -H, ArrowDown: H }[event.key];
    if (step) {
      const next = (state.head ?? 0) + step;
      if (next >= 0 && next < L * H) { select(next); cells[next].focus(); }
      event.preventDefault();
    }
  });
  function select(head) {
    if (head === state.head) return;
    state.head = head;
    drawHead();
  }
  function pin(head) {
    state.pins = state.pins.includes(head) ? state.pins.filter((other) => other !== head) : [...state.pins, head];
    if (live) live.send({ pins: state.pins.map((h) => [Math.floor(h / H), h % H]) });
    drawPins(); drawHead(); remember();
  }

  // Only a style that changes is set: the browser works each set one out anew, and there are hundreds.
  function restyle(node, name, value) {
    const level = value.toFixed(2);
    if (node.level !== level) { node.level = level; node.style.setProperty(name, level); }
  }
  let now = [];
  function draw() {
    if (state.by === "box" && !state.box) state.by = hasRegion ? "region" : "picture";
    for (const button of root.querySelectorAll("[data-rows]")) button.classList.toggle("on", button.dataset.rows === state.rows);
    const rows = new Set(rowList());
    chipOf.forEach((chip, row) => { chip.classList.toggle("on", rows.has(row)); chip.setAttribute("aria-selected", rows.has(row)); });
    const offered = Object.keys(values).filter((name) => (name !== "box" || state.box) && (name !== "patch" || state.patch !== null));
    if (offered.length !== choose.length || offered.some((name, i) => choose.options[i].value !== name))
      choose.replaceChildren(...offered.map((name) => element("option", { value: name }, values[name].label)));
    choose.value = state.by;
    now = cells.map((_, head) => values[state.by].of(head));
    const written = (x) => (state.by.startsWith("score:") ? x.toFixed(3) : percent(x));
    const top = Math.max(1e-9, ...now.filter((x) => !Number.isNaN(x)));
    cells.forEach((cell, head) => {
      const none = Number.isNaN(now[head]);
      restyle(cell, "--level", none ? 0 : Math.max(0, now[head]) / top);
      cell.classList.toggle("none", none);
      const words = `${nameOf(head)} ${none ? "no map kept" : written(now[head])}`;
      if (cell.title !== words) { cell.title = words; cell.setAttribute("aria-label", words); }
    });
    ofGrid.showRange(written(top));
    const order = cells.map((_, head) => head).filter((head) => !Number.isNaN(now[head])).sort((a, b) => now[b] - now[a]).slice(0, 8);
    ranking.replaceChildren(...order.map((head) => element("li", {}, element("button", { type: "button", title: "Point: see where it looks. Click: pin it.", onclick: () => { select(head); pin(head); },
      onpointerenter: () => select(head) }, `${nameOf(head)} `, element("b", {}, written(now[head]))))));
    if (state.head === null) state.head = order.find((head) => stored.has(head)) ?? order[0] ?? 0;
    drawPatch(); drawHead(); drawPins(); remember();
  }
  function drawHead() {
    const head = state.head;
    cells.forEach((cell, i) => {
      cell.classList.toggle("on", i === head);
      cell.classList.toggle("pinned", state.pins.includes(i));
      const tab = i === head ? 0 : -1;
      if (cell.tabIndex !== tab) cell.tabIndex = tab;
    });
    const kept = stored.has(head);
    shown = kept ? data.views.map((_, number) => heat(number, head)) : [];
    if (kept) {
      sharedPeak = state.own ? peakOf(shown) : peakOfAll();
      ofPictures.showRange(sharedPeak);
    }
    ofPictures.showMark(Boolean(state.box || (state.by === "patch" && state.patch !== null)));
    data.views.forEach((_, number) => paint(number));
    const on = kept ? meansOf(head) : null;
    data.tokens.forEach((token, i) => restyle(token.chip, "--look", on ? Math.min(1, on[V + i] * 2) : 0));
    const words = typeof state.rows === "number" ? `from “${data.tokens.find((t) => t.row === state.rows).text.trim() || "⏎"}”` : state.rows === "question" ? "from the question's tokens (mean)" : "from the last token";
    const parts = hasRegion ? [`evidence ${percent(over((row) => mass.region(row, head)))}`] : [];
    parts.push(`picture ${percent(over((row) => mass.picture(row, head)))}`);
    reading.textContent = `${nameOf(head)}, ${words}: ${parts.join(", ")}` + (kept ? "" : " (its map was left out)");
  }
  const figures = new Map();  // of pinned heads: a canvas takes longer to make than to draw
  function figureOf(head) {
    if (!figures.has(head)) {
      const unpin = element("button", { type: "button", "aria-label": "unpin " + nameOf(head), onclick: () => pin(head) }, "×");
      const canvas = stored.has(head) && hasViews ? element("canvas", { width: 200 }) : null;
      figures.set(head, { canvas, figure: element("figure", {}, canvas, element("figcaption", {}, nameOf(head) + " ", unpin),
        stored.has(head) ? null : element("p", { class: "hint" }, "map left out")) });
    }
    return figures.get(head);
  }
  function drawPins() {
    root.querySelector(".pins-title").hidden = !state.pins.length;
    const wanted = state.pins.map((head) => figureOf(head).figure);
    if (wanted.length !== pinned.children.length || wanted.some((figure, i) => pinned.children[i] !== figure)) pinned.replaceChildren(...wanted);
    for (const head of state.pins) {
      const { canvas } = figureOf(head);
      if (!canvas) continue;
      const maps = data.views.map((_, number) => heat(number, head)), highest = maps.reduce((best, map) => (map.peak > best.peak ? map : best));
      const view = data.views[highest.number], image = canvases[highest.number].previousSibling, context = canvas.getContext("2d");
      const height = Math.round(200 * view.size[1] / view.size[0]);
      if (canvas.height !== height) canvas.height = height;
      if (image.complete) context.drawImage(image, 0, 0, canvas.width, canvas.height);
      wash(context, highest, state.own ? peakOf(maps) : peakOfAll(), canvas);
      view.outlines.forEach((box) => outline(context, box, canvas.width / view.size[0], "#fff"));
    }
  }
  function drawPatch() {  // which rows and heads look hardest at the patch that was clicked
    patchList.hidden = state.by !== "patch";
    if (patchList.hidden) return;
    const pairs = [];
    for (const [head] of stored) for (let row = 0; row < nRows; row++) pairs.push([read(row, head, state.patch), row, head]);
    pairs.sort((a, b) => b[0] - a[0]);
    patchList.replaceChildren("This patch is seen by ", ...pairs.slice(0, 6).map(([value, row, head]) => element("button", { type: "button",
      title: "Show this head, from this token", onclick: () => { state.rows = row; state.head = head; draw(); } }, `${nameOf(head)} from “${data.tokens.find((t) => t.row === row).text.trim() || "⏎"}” ${percent(value)}`)));
  }

  // --- the answer, token by token ----------------------------------------------------------------------------------
  const answerRows = data.tokens.filter((token) => token.row >= 0 && token.predicts).map((token) => token.row);
  play.hidden = data.answer.tokens.length === 0;
  const answered = (p) => p.reduce((a, b) => a * b, 1);
  function sayAnswer() {
    answerLine.replaceChildren("Answer: ", element("b", {}, data.answer.text || "(nothing)"),
      data.answer.p.length ? ` with probability ${percent(answered(data.answer.p))}` : "",
      data.clean ? element("span", { class: "clean" }, ` · without intervention: ${data.clean.text || "(nothing)"} ${percent(answered(data.clean.p))}`) : "");
  }
  let timer = null;
  function playAnswer() {
    clearInterval(timer);
    let step = 0;
    const next = () => {
      if (step >= Math.min(answerRows.length, data.answer.tokens.length)) { clearInterval(timer); return sayAnswer(); }
      state.rows = answerRows[step];
      draw();
      answerLine.replaceChildren("Answer: ", data.answer.tokens.slice(0, step).join(""), element("b", {}, data.answer.tokens[step]), ` ${percent(data.answer.p[step])}`);
      step++;
    };
    next();
    timer = setInterval(next, 900);
  }

  // --- a link that reproduces the view -----------------------------------------------------------------------------
  let remembering = null;
  function remember() {  // a moment later: to write an address takes longer than to draw
    clearTimeout(remembering);
    if (!live) remembering = setTimeout(writeAddress, 150);
  }
  function writeAddress() {
    const parts = { rows: state.rows, head: state.head, by: state.by, pins: state.pins.join(".") };
    if (state.patch !== null) parts.patch = state.patch;
    if (state.box) parts.box = [state.box.view, state.box.x0, state.box.y0, state.box.x1, state.box.y1].map(Math.round).join(".");
    try { history.replaceState(null, "", "#" + new URLSearchParams(parts)); } catch { /* a page inside a frame has no address of its own */ }
  }
  function recall() {
    const parts = new URLSearchParams(location.hash.slice(1)), whole = (x) => (x !== null && /^\d+$/.test(x) ? Number(x) : null);
    const rows = parts.get("rows"), head = whole(parts.get("head")), patch = whole(parts.get("patch"));
    if (rows in groups) state.rows = rows; else if (whole(rows) !== null && whole(rows) < nRows) state.rows = whole(rows);
    if (head !== null && head < L * H) state.head = head;
    if (parts.has("pins")) state.pins = parts.get("pins").split(".").map(whole).filter((pin) => pin !== null && pin < L * H);
    if (patch !== null && patch < V) state.patch = patch;
    const box = (parts.get("box") || "").split(".").map(whole);
    if (box.length === 5 && box.every((x) => x !== null) && data.views[box[0]]) {
      state.box = { view: box[0], x0: box[1], y0: box[2], x1: box[3], y1: box[4] };
      boxKeys = touched(state.box);
    }
    const by = parts.get("by");
    if (by in values && (by !== "box" || state.box) && (by !== "patch" || state.patch !== null)) state.by = by;
  }

  // --- live: another question, an intervention -----------------------------------------------------------------------
  function liveControls() {
    const question = element("input", { type: "text", title: "The question: edit it, then Run", value: data.question, "aria-label": "question" });
    const kind = element("select", { "aria-label": "intervention", title: "What is done to the pinned heads" }, ...[["none", "no intervention"], ["zero", "ablate the pinned heads (zero)"], ["uniform", "pinned heads look evenly (uniform)"],
      ["knockout", "cut the evidence from the pinned heads"], ["bias", "bias the pinned heads to the box"]].map(([value, label]) => element("option", { value }, label)));
    const strength = element("input", { type: "range", min: "-8", max: "8", step: "0.5", value: "4", "aria-label": "bias added to the scores", title: "Strength of the bias: added to the scores of the pinned heads on the box" });
    const run = element("button", { type: "button", class: "run", title: "Let the model answer again", onclick: () => { run.disabled = true; live.send({ run: { question: question.value, kind: kind.value, value: Number(strength.value) } }); } }, "Run");
    live.failed = (message) => { run.disabled = false; reading.textContent = message; };
    question.addEventListener("keydown", (event) => { if (event.key === "Enter") run.click(); event.stopPropagation(); });
    if (live.settings) { kind.value = live.settings.kind; strength.value = live.settings.value; }
    return element("div", { class: "live" }, question, kind, strength, run);
  }

  if (live && live.view) { Object.assign(state, live.view); if (live.view.asked !== data.question) Object.assign(state, { asked: data.question, rows: opensAt }); boxKeys = state.box ? touched(state.box) : []; if (!(state.by in values)) state.by = hasRegion ? "region" : "picture"; if (typeof state.rows === "number" && state.rows >= nRows) state.rows = "last"; }
  else recall();
  sayAnswer();
  draw();
  return state;
}
