// The strip of layers: arrow keys move, and a panel shows the tensors of the layer that is pointed at, focused or kept.
"use strict";

(() => {
  const ROWS_AT_ONCE = 120;
  const data = JSON.parse(document.getElementById("tensors").textContent);
  const strip = document.getElementById("strip");
  const cells = [...strip.querySelectorAll(".cell")];
  const panel = document.getElementById("panel");
  const heading = panel.querySelector("h3");
  const facts = panel.querySelector("p");
  const scroller = panel.querySelector(".scroller");
  const body = panel.querySelector("tbody");
  let kept = null; // the index of the cell that a click or Enter keeps open
  let shown = null; // the index of the cell in the panel
  let waiting = null; // the index of the cell that the next frame shows
  let pointer = ""; // where it was last
  let rest = null; // the rows that are not drawn yet

  function element(tag, text, attributes = {}) {
    const made = document.createElement(tag);
    made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  function* rowsOf(cell) {
    for (const [unit, note, tensors] of cell.units) {
      const row = document.createElement("tr");
      const title = element("th", unit, { class: "unit", colspan: 5 });
      title.append(element("span", ` ${data.notes[note]}`));
      row.append(title);
      yield row;
      for (let index = 0; index < tensors.length; index += 3) {
        const leaf = data.leaves[tensors[index]];
        const [dtype, shape, size] = data.forms[tensors[index + 1]];
        const row = document.createElement("tr");
        const name = leaf.startsWith(".") ? unit + leaf : leaf.slice(1);
        row.append(element("th", name, { scope: "row" }), element("td", dtype), element("td", shape));
        row.append(element("td", size, { class: "number" }), element("td", data.files[tensors[index + 2]]));
        yield row;
      }
    }
  }

  function drawMore() {
    const fragment = document.createDocumentFragment();
    for (let count = 0; rest !== null && count < ROWS_AT_ONCE; count += 1) {
      const { value, done } = rest.next();
      if (done) rest = null;
      else fragment.append(value);
    }
    body.append(fragment);
  }

  function show(index) {
    waiting = null;
    if (index === shown) return;
    if (shown !== null) cells[shown].setAttribute("aria-selected", "false");
    shown = index;
    cells[index].setAttribute("aria-selected", "true");
    heading.textContent = data.cells[index].title;
    facts.textContent = data.cells[index].facts;
    body.replaceChildren();
    scroller.scrollTop = 0;
    rest = rowsOf(data.cells[index]);
    drawMore();
    panel.hidden = false;
  }

  // Pointing runs over many cells in a moment: only the last one of a frame is drawn.
  function showSoon(index) {
    if (waiting === null) requestAnimationFrame(() => { if (waiting !== null) show(waiting); });
    waiting = index;
  }

  function focus(index) {
    for (const cell of cells) cell.setAttribute("tabindex", "-1");
    cells[index].setAttribute("tabindex", "0");
    cells[index].focus();
  }

  function neighbour(index, lines) {
    const { column, row } = cells[index].dataset;
    const step = lines * Number(strip.dataset.perLine);
    const same = (cell, columns, otherRow) => Number(cell.dataset.column) === columns && cell.dataset.row === otherRow;
    const hasExperts = cells.some((cell) => cell.dataset.row === "1");
    // With experts, down goes from a layer to its experts, and from these to the next line.
    const inside = hasExperts && (lines > 0) === (row === "0");
    const target = inside ? Number(column) : Number(column) + step;
    const found = cells.findIndex((cell) => same(cell, target, hasExperts ? String(1 - row) : row));
    return found >= 0 ? found : cells.findIndex((cell) => Number(cell.dataset.column) === target && target !== Number(column));
  }

  function sideways(index, step) {
    for (let next = index + step; next >= 0 && next < cells.length; next += step) {
      if (cells[next].dataset.row === cells[index].dataset.row) return next;
    }
    return -1;
  }

  function moveTo(index, key) {
    switch (key) {
      case "ArrowRight": return sideways(index, 1);
      case "ArrowLeft": return sideways(index, -1);
      case "ArrowDown": return neighbour(index, 1);
      case "ArrowUp": return neighbour(index, -1);
      case "Home": return 0;
      case "End": return cells.length - 1;
      default: return null;
    }
  }

  function keep(index) {
    kept = index;
    show(index);
  }

  cells.forEach((cell, index) => {
    cell.addEventListener("focus", () => { kept = null; show(index); });
    cell.addEventListener("click", () => { focus(index); keep(index); });
  });
  document.addEventListener("pointermove", (event) => {
    // A page that scrolls under a resting pointer sends this too: then the keyboard is at work.
    const here = `${event.screenX},${event.screenY}`;
    const moved = here !== pointer;
    pointer = here;
    const index = moved ? cells.indexOf(event.target.closest(".cell")) : -1;
    if (index >= 0 && kept === null) showSoon(index);
  });
  strip.addEventListener("keydown", (event) => {
    const index = cells.indexOf(document.activeElement);
    if (index < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "Enter" || event.key === " ") keep(index);
    else {
      const target = moveTo(index, event.key);
      if (target === null) return;
      if (target >= 0) focus(target);
    }
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") kept = null; });
  scroller.addEventListener("scroll", () => {
    if (scroller.scrollTop + 2 * scroller.clientHeight > scroller.scrollHeight) drawMore();
  });
  document.getElementById("hint").hidden = false;
})();
