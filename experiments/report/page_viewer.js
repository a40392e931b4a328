
// Remarks of figures: shown at the pointer at once, instead of the browser's own titles, which take a second.
{
  const box = make("div", undefined, "remark");
  box.hidden = true;
  box.setAttribute("role", "status");
  document.body.append(box);
  document.addEventListener("pointermove", (event) => {
    const tip = event.target.closest?.(".tip");
    box.hidden = !tip;
    if (!tip) return;
    const title = tip.querySelector("title");
    if (title !== null) { tip.setAttribute("aria-label", title.textContent); title.remove(); }
    (event.target.closest("dialog") ?? document.body).append(box);
    box.textContent = tip.getAttribute("aria-label");
    const left = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8);
    box.style.left = `${Math.max(8, left)}px`;
    box.style.top = `${event.clientY + (event.clientY > innerHeight - 80 ? -14 - box.offsetHeight : 16)}px`;
  });
}

// What is drawn of the kept tokens, in all examples at once.
function showLayer(name) {
  for (const views of document.querySelectorAll(".views")) views.dataset.layer = name;
  for (const chip of document.querySelectorAll("#layers .chip")) {
    chip.setAttribute("aria-pressed", String(chip.dataset.layer === name));
  }
}
for (const chip of document.querySelectorAll("#layers .chip")) {
  chip.addEventListener("click", () => showLayer(chip.dataset.layer));
}

// The viewer: one figure or one example, as large as the window, with zoom; an example also system by system.
{
  const dialog = make("dialog", undefined, "viewer"), title = make("strong"), tools = make("div", undefined, "tools");
  const stage = make("div", undefined, "stage"), names = make("div", undefined, "names");
  const note = make("p", undefined, "soft");
  const button = (text, name, press) => {
    const node = make("button", text, "chip");
    node.type = "button";
    if (name) node.setAttribute("aria-label", name);
    node.addEventListener("click", press);
    return node;
  };

  // Zoom: the content is moved and scaled; a point under the pointer stays where it is.
  let zoom = { scale: 1, x: 0, y: 0 };
  const place = () => {
    if (stage.firstChild) stage.firstChild.style.transform = `translate(${zoom.x}px, ${zoom.y}px) scale(${zoom.scale})`;
  };
  function zoomBy(factor, clientX, clientY) {
    const area = stage.getBoundingClientRect(), scale = Math.min(12, Math.max(1, zoom.scale * factor));
    const [x, y] = [(clientX ?? area.left + area.width / 2) - area.left, (clientY ?? area.top + area.height / 2) - area.top];
    const by = scale / zoom.scale;
    zoom = scale === 1 ? { scale, x: 0, y: 0 } : { scale, x: x - by * (x - zoom.x), y: y - by * (y - zoom.y) };
    place();
  }
  stage.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoomBy(event.deltaY < 0 ? 1.2 : 1 / 1.2, event.clientX, event.clientY);
  }, { passive: false });
  stage.addEventListener("dblclick", () => zoomBy(0));
  stage.addEventListener("pointerdown", (event) => { event.preventDefault(); stage.setPointerCapture(event.pointerId); });
  stage.addEventListener("pointermove", (event) => {
    if (!stage.hasPointerCapture(event.pointerId) || zoom.scale === 1) return;
    zoom = { ...zoom, x: zoom.x + event.movementX, y: zoom.y + event.movementY };
    place();
  });

  // An example: `shown` is what was clicked, `now` what the pointer or the focus previews.
  const layers = ["kept", "heat", "picture"], words = { kept: "kept tokens", heat: "scores", picture: "picture" };
  let example = null, shown = { view: 0, layer: "kept" };
  function draw(now = shown) {
    const view = example.views[now.view];
    const source = (now.layer === "picture" ? null : view.querySelector(`img.${now.layer}`)) ?? example.picture;
    const picture = stage.firstChild ?? stage.appendChild(make("img"));
    picture.src = source.src;
    picture.alt = source.alt;
    title.textContent = view.dataset.label;
    const missing = now.layer === "heat" && view.querySelector("img.heat") === null;
    note.textContent = (missing ? "no scores: this system does not rank tokens. " : "") + view.dataset.kept;
    const chips = [...tools.querySelectorAll("[data-layer]")], buttons = [...names.children];
    for (const chip of chips) chip.setAttribute("aria-pressed", String(chip.dataset.layer === now.layer));
    buttons.forEach((name, i) => name.setAttribute("aria-pressed", String(i === now.view)));
    place();
  }
  const choose = (change) => { shown = { ...shown, ...change }; draw(); };
  const previewed = (node, change) => {
    node.addEventListener("pointerenter", () => draw({ ...shown, ...change }));
    node.addEventListener("pointerleave", () => draw());
    return node;
  };

  function open(heading, extra) {
    zoom = { scale: 1, x: 0, y: 0 };
    title.textContent = heading;
    tools.replaceChildren(title, ...extra, button("−", "smaller", () => zoomBy(1 / 1.5)),
      button("+", "larger", () => zoomBy(1.5)), button("close", undefined, () => dialog.close()));
    names.replaceChildren();
    note.textContent = "";
    stage.replaceChildren();
    dialog.showModal();
  }
  function openFigure(panel) {
    example = null;
    open(panel.querySelector("h3").textContent, []);
    stage.append(panel.querySelector("svg").cloneNode(true));
    note.textContent = panel.querySelector("p").textContent;
  }
  function openExample(card, number, layer) {
    const views = [...card.querySelectorAll(".view")];
    example = { views, picture: card.querySelector(".picture img") };
    open("", layers.map((name) => {
      const chip = previewed(button(words[name], undefined, () => choose({ layer: name })), { layer: name });
      chip.dataset.layer = name;
      return chip;
    }));
    names.replaceChildren(...views.map((view, i) => (
      previewed(button(view.dataset.label, undefined, () => choose({ view: i })), { view: i }))));
    choose({ view: number, layer });
  }
  dialog.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: ["view", -1], ArrowRight: ["view", 1], ArrowUp: ["layer", -1], ArrowDown: ["layer", 1] };
    if (event.key === "+" || event.key === "-") zoomBy(event.key === "+" ? 1.5 : 1 / 1.5);
    if (example === null || !(event.key in steps)) return;
    event.preventDefault();
    const [what, step] = steps[event.key];
    const next = (i, n) => (i + step + n) % n;
    if (what === "view") choose({ view: next(shown.view, example.views.length) });
    else choose({ layer: layers[next(layers.indexOf(shown.layer), layers.length)] });
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.append(tools, stage, names, note);
  document.body.append(dialog);

  for (const panel of document.querySelectorAll(".panel")) {
    const enlarge = button("enlarge", `enlarge: ${panel.querySelector("h3").textContent}`, () => openFigure(panel));
    enlarge.classList.add("corner");
    panel.prepend(enlarge);
    panel.querySelector("svg").addEventListener("click", () => openFigure(panel));
  }
  for (const card of document.querySelectorAll(".sample")) {
    const picture = card.querySelector(".picture img");
    [...card.querySelectorAll(".view")].forEach((view, number) => {
      const enlarge = view.querySelector(".enlarge");
      enlarge.addEventListener("click", () => openExample(card, number, card.querySelector(".views").dataset.layer));
      // The plain picture lies over the drawn one while the pointer is on it.
      enlarge.addEventListener("pointerenter", () => {
        const plain = picture.cloneNode();
        plain.className = "plain";
        enlarge.append(plain);
      });
      enlarge.addEventListener("pointerleave", () => enlarge.querySelector(".plain")?.remove());
    });
    card.querySelector(".picture .enlarge").addEventListener("click", () => openExample(card, 0, "picture"));
  }
}
