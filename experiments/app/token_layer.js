// What happens on the page without a word to the server: views of the pictures, the token under the pointer, the
// denoising step by step, the command that is copied. One listener for each kind of event, on the document, because
// Gradio replaces the answers as a whole.
(() => {
  const KINDS = ["kept", "dropped", "scaffold", "summary", "merged"]; // TokenKind of token_layer.py
  const ROLES = ["global view", "tile", "crop"]; // shirg.Role
  const PARTS = 10000;
  const tokensOf = new WeakMap();

  const tokens = (picture) => {
    if (!tokensOf.has(picture)) tokensOf.set(picture, JSON.parse(picture.dataset.tokens));
    return tokensOf.get(picture);
  };
  const area = ([x0, y0, x1, y1]) => (x1 - x0) * (y1 - y0);
  const under = (picture, x, y) =>
    tokens(picture)
      .filter(([x0, y0, x1, y1]) => x0 <= x && x < x1 && y0 <= y && y < y1)
      .sort((a, b) => area(a) - area(b) || a[4] - b[4]);

  const describe = ([, , , , kind, number, view, role, score, rank], ranked) => {
    if (view < 0) return `${KINDS[kind]} token ${number}`;
    const where = role === 0 ? ROLES[0] : `${ROLES[role]} ${view}`;
    const valued = score === null ? "" : `, score ${score}, rank ${rank} of ${ranked}`;
    return `token ${number} (${where}): ${KINDS[kind]}${valued}`;
  };

  const show = (card, x, y) => {
    const picture = card.querySelector(".picture");
    const found = under(picture, x, y);
    const mark = card.querySelector(".mark");
    const ranked = tokens(picture).filter((token) => token[9] !== null).length;
    mark.hidden = found.length === 0;
    if (found.length) {
      const [x0, y0, x1, y1] = found[0].map((edge) => (100 * edge) / PARTS);
      Object.assign(mark.style, { left: `${x0}%`, top: `${y0}%`, width: `${x1 - x0}%`, height: `${y1 - y0}%` });
    }
    const text = found.slice(0, 3).map((token) => describe(token, ranked)).join("; ");
    card.querySelector(".pointed").textContent = text || "no token here";
  };

  const cards = (element) => element.closest(".result").querySelectorAll(".card");

  // All cards follow the pointer: the same place in every selector's picture.
  document.addEventListener("pointermove", (event) => {
    const picture = event.target.closest?.(".result .picture");
    if (!picture) return;
    const frame = picture.getBoundingClientRect();
    const [x, y] = [(event.clientX - frame.left) / frame.width, (event.clientY - frame.top) / frame.height];
    cards(picture).forEach((card) => show(card, PARTS * x, PARTS * y));
  });

  const switchTo = (button) => {
    const { view } = button.dataset;
    button.parentElement.querySelectorAll("button").forEach((other) => {
      other.setAttribute("aria-checked", String(other === button));
    });
    cards(button).forEach((card) => {
      // A view without a picture of its own shows what lies below: the plain picture.
      card.querySelectorAll(".picture [data-view]").forEach((layer) => {
        layer.hidden = layer.dataset.view !== view;
        if (!layer.hidden) card.querySelector(".caption").textContent = layer.dataset.caption;
      });
    });
  };

  const copy = (button) => {
    const code = button.parentElement.querySelector("code");
    const said = (word) => { button.textContent = word; setTimeout(() => { button.textContent = "Copy"; }, 1500); };
    const select = () => { getSelection().selectAllChildren(code); said("Selected"); };
    if (!navigator.clipboard) return select();
    return navigator.clipboard.writeText(code.textContent).then(() => said("Copied"), select);
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest?.(".result button");
    if (button?.dataset.view) switchTo(button);
    if (button?.classList.contains("copy")) copy(button);
    event.target.closest?.(".result .picture")?.closest(".card").classList.toggle("large");
  });

  document.addEventListener("input", (event) => {
    const range = event.target.closest?.(".result .stepper input");
    if (!range) return;
    const step = Number(range.value);
    range.parentElement.querySelector("output").textContent = `step ${step} of ${range.max}`;
    cards(range).forEach((card) => {
      card.querySelectorAll(".slot").forEach((slot) => {
        slot.classList.toggle("masked", Number(slot.dataset.step) > step);
      });
    });
  });
})();
