"use strict";
document.documentElement.classList.add("scripted");
const $ = (id) => document.getElementById(id);

const make = (tag, text, name) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
};

// Commands: copied to the clipboard, or selected where a page from disk may not write there.
async function copy(button) {
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
    button.textContent = "copied";
  } catch {
    const all = [...document.querySelectorAll(".commands code")];
    let code = all.find((c) => c.textContent === button.dataset.copy);
    if (code === undefined) {
      code = make("code", button.dataset.copy);
      document.querySelector(".commands").append(make("span"), code, make("span"));
    }
    getSelection().selectAllChildren(code);
    code.scrollIntoView({ block: "center" });
    button.textContent = "selected";
  }
  setTimeout(() => { button.textContent = "copy"; }, 1500);
}
for (const button of document.querySelectorAll(".copy")) button.addEventListener("click", () => copy(button));

// The table: sort by a heading, filter by text and budget, mark the best of the rows shown; each part separately. The
// rows of a large study are data, and only the first of those that a filter keeps are made into elements.
if ($("table") !== null) {
  const table = $("table"), heads = [...table.tHead.rows[0].cells];
  const stored = $("rows") === null ? null : JSON.parse($("rows").textContent);
  let limit = stored === null ? Infinity : stored.most;

  const fromNode = (node) => ({
    node,
    equal: Number(node.dataset.equal),
    cells: [...node.cells].map((cell) => [
      cell.textContent.trim(), cell.dataset.v === undefined ? null : Number(cell.dataset.v), "", "", cell.dataset.quartiles,
    ]),
  });
  const parts = [...table.tBodies].map((body, number) => {
    const title = [...body.rows].filter((row) => row.className === "part");
    const rows = stored === null ? [...body.rows].filter((row) => !title.includes(row)).map(fromNode)
      : stored.parts[number].map((i) => stored.rows[i]);
    return { body, title, rows, order: rows };
  });
  const all = parts.flatMap((part) => part.rows);

  const value = (row, column) => {
    const [text, number = null] = row.cells[column] ?? [""];
    if (number !== null) return number;
    return heads[column].classList.contains("num") || text === "" || text === "-" ? null : text;
  };
  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));

  // As page.html makes a cell.
  function cellOf([text, number = null, interval = "", hint = "", quartiles = ""], head) {
    const status = head.dataset.title === "status" && head.dataset.kind === "text";
    const names = [...head.classList];
    if (!names.includes("num")) names.push(head.dataset.title);
    if (status) names.push(`status-${text}`);
    const cell = make("td", text, names.join(" "));
    if (number !== null) cell.dataset.v = number;
    if (quartiles) cell.dataset.quartiles = quartiles;
    if (hint) cell.title = hint;
    if (interval) {
      cell.append(make("span", interval, "ci"));
      const [low, high] = interval.split(" to ").map(Number);
      if (head.dataset.kind === "score" && high <= 100) {
        const bar = make("span", undefined, "bar"), range = make("i"), middle = make("b");
        range.style.left = `${low}%`;
        range.style.width = `${high - low}%`;
        middle.style.left = `${number}%`;
        bar.append(range, middle);
        cell.append(bar);
      }
    }
    return cell;
  }
  function nodeOf(row) {
    if (row.node === undefined) {
      row.node = make("tr");
      const button = make("button", "copy", "copy"), last = make("td", undefined, "js roomy");
      button.type = "button";
      button.dataset.copy = row.command;
      button.addEventListener("click", () => copy(button));
      last.append(button);
      row.node.append(...row.cells.map((cell, column) => cellOf(cell, heads[column])), last);
    }
    row.best.forEach((best, column) => row.node.cells[column].classList.toggle("best", best));
    return row.node;
  }

  function show() {
    for (const { body, title, order } of parts) {
      body.replaceChildren(...title, ...order.filter((row) => row.kept).slice(0, limit).map(nodeOf));
    }
    const kept = Math.max(...parts.map(({ rows }) => rows.filter((row) => row.kept).length));
    $("more-rows")?.classList.toggle("hidden", kept <= limit);
    const listed = parts.reduce((sum, { body, title }) => sum + body.rows.length - title.length, 0);
    const counted = all.filter((row) => row.kept).length;
    $("count").textContent = `${counted} of ${all.length} rows` + (listed < counted ? `, ${listed} shown` : "");
  }

  function sortBy(column) {
    const head = heads[column], before = head.getAttribute("aria-sort");
    const orders = Number(head.dataset.direction) > 0 ? ["descending", "ascending"] : ["ascending", "descending"];
    const order = [...orders, null][orders.indexOf(before) + 1];
    heads.forEach((h) => h.removeAttribute("aria-sort"));
    if (order !== null) head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    for (const part of parts) {
      const known = part.rows.filter((row) => value(row, column) !== null);
      const rest = part.rows.filter((row) => value(row, column) === null);
      known.sort((a, b) => sign * compare(value(a, column), value(b, column)));
      // Rows without a value stay last in both orders.
      part.order = order === null ? part.rows : [...known, ...rest];
    }
    show();
  }

  // As Column.best: the highest (or lowest) value, where not all are equal; a time, only where its quartiles are below
  // those of all others. Values with a mark are suspicious, and never the best.
  function bestOf(among, column, sign) {
    const rows = among.filter((row) => !row.cells[column][0].includes("!"));
    const values = rows.map((row) => sign * value(row, column)), top = Math.max(...values);
    if (!sign || Math.min(...values) === top) return [];
    const best = rows.filter((_, i) => values[i] === top);
    if (!heads[column].dataset.measured) return best;
    const quartiles = (row) => row.cells[column][4]?.split(" ").map(Number);
    return best.filter((row) => quartiles(row) && rows.every((other) => (
      other === row || (quartiles(other) && quartiles(row)[1] < quartiles(other)[0]))));
  }

  function filter() {
    const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const equal = $("equal") !== null && $("equal").checked;
    for (const row of all) {
      // Only names and counts are searched, not measurements: "40" is a budget, not 0.40 ms.
      const named = row.cells.filter((_, column) => /^(text|count)$/.test(heads[column]?.dataset.kind));
      const text = named.map(([shown]) => shown).join(" ").toLowerCase();
      row.kept = words.every((word) => text.includes(word)) && !(equal && row.equal === 0);
      row.best = heads.map(() => false);
    }
    heads.forEach((head, column) => {
      // Rows over a part of the samples are in a second part; neither they nor other budgets are marked as best.
      const rows = (parts[0]?.rows ?? []).filter((row) => row.kept && Number(row.equal) && value(row, column) !== null);
      for (const row of bestOf(rows, column, Number(head.dataset.best))) row.best[column] = true;
    });
    show();
  }

  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => sortBy(column)));
  $("filter").addEventListener("input", filter);
  $("details").addEventListener("change", () => table.classList.toggle("brief", !$("details").checked));
  $("equal")?.addEventListener("change", filter);
  $("more-rows")?.addEventListener("click", () => { limit += stored.most; show(); });
  filter();
}

// The predictions browser: two systems side by side.
if ($("data") !== null) {
  const data = JSON.parse($("data").textContent), right = data.right, step = 50;
  const tests = {
    all: () => true,
    wrong: (a, b) => !b,
    fixed: (a, b) => !a && b,
    broken: (a, b) => a && !b,
    "both right": (a, b) => a && b,
    "both wrong": (a, b) => !a && !b,
  };
  let verdict = "all", limit = step;

  for (const [id, chosen] of [["first", data.first], ["second", data.second]]) {
    data.systems.forEach((system, i) => {
      const option = make("option", system.label);
      option.value = i;
      option.selected = i === chosen;
      $(id).append(option);
    });
    $(id).addEventListener("change", () => { limit = step; show(); });
  }
  for (const name of Object.keys(tests)) {
    const chip = make("button", name, "chip");
    chip.type = "button";
    chip.dataset.verdict = name;
    chip.addEventListener("click", () => { verdict = name; limit = step; show(); });
    $("verdicts").append(chip, " ");
  }
  $("search").addEventListener("input", () => { limit = step; show(); });
  $("more").addEventListener("click", () => { limit += step; show(); });

  const given = (system, i) => data.samples[i].given[system.answers[i]] ?? [null, null];
  const answer = ([text, score]) => {
    const cell = make("td", undefined, "wrap");
    cell.append(make("span", text.trim() === "" ? "(empty)" : text, `answer ${score >= right ? "right" : "wrong"}`));
    if (score > 0 && score < 1) cell.append(` ${score.toFixed(2)}`);
    return cell;
  };

  function show() {
    const [a, b] = [data.systems[$("first").value], data.systems[$("second").value]];
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const counts = Object.fromEntries(Object.keys(tests).map((name) => [name, 0]));
    const rows = [];
    data.samples.forEach((sample, i) => {
      const [before, after] = [given(a, i), given(b, i)];
      if (before[1] === null || after[1] === null) return;
      const text = [sample.question, ...sample.answers, before[0], after[0], sample.kind].join(" ").toLowerCase();
      if (!words.every((word) => text.includes(word))) return;
      for (const [name, test] of Object.entries(tests)) {
        if (!test(before[1] >= right, after[1] >= right)) continue;
        counts[name] += 1;
        if (name === verdict) rows.push([sample, before, after]);
      }
    });
    for (const chip of document.querySelectorAll("#verdicts .chip")) {
      chip.textContent = `${chip.dataset.verdict} ${counts[chip.dataset.verdict]}`;
      chip.setAttribute("aria-pressed", String(chip.dataset.verdict === verdict));
    }
    const head = make("tr");
    head.append(...["question", "expected", a.label, b.label, "kind", "sample"].map((title) => make("th", title)));
    $("browser").tHead.replaceChildren(head);
    $("browser").tBodies[0].replaceChildren(...rows.slice(0, limit).map(([sample, before, after]) => {
      const row = make("tr"), id = make("td");
      if (sample.card === null) id.append(make("code", sample.id));
      else { const link = make("a", sample.id); link.href = `#card-${sample.card}`; id.append(link); }
      row.append(make("td", sample.question, "wrap"), make("td", sample.answers.join(" | "), "wrap"),
        answer(before), answer(after), make("td", sample.kind, "soft"), id);
      return row;
    }));
    $("more").classList.toggle("hidden", rows.length <= limit);
    $("more").textContent = `show more (${rows.length - limit} left)`;
  }
  show();
}
