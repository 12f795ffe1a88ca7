// Tables that can be sorted, filtered and downloaded; both sites load this one file. No library, no network.
(function () {
  "use strict";
  const text = (cell) => cell.textContent.trim();
  const number = (s) => {
    const found = s.replace(/\u2212/g, "-").replace(/[\u202f\u00a0,](?=\d{3})/g, "").match(/^[+-]?\d*\.?\d+/);
    return found ? parseFloat(found[0]) : NaN;
  };

  function sortBy(table, column, header) {
    const up = header.getAttribute("aria-sort") !== "ascending";
    const body = table.tBodies[0];
    const rows = Array.from(body.rows);
    const keys = new Map(rows.map((row) => [row, row.cells[column] ? text(row.cells[column]) : ""]));
    const numeric = rows.filter((row) => keys.get(row)).every((row) => !Number.isNaN(number(keys.get(row))));
    rows.sort((a, b) => {
      const [x, y] = [keys.get(a), keys.get(b)];
      const order = numeric ? (number(x) || 0) - (number(y) || 0) : x.localeCompare(y, "en", { numeric: true });
      return up ? order : -order;
    });
    table.querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    rows.forEach((row) => body.appendChild(row));
  }

  function makeSortable(table) {
    Array.from(table.tHead.rows[0].cells).forEach((header, column) => {
      header.dataset.sort = "";
      header.tabIndex = 0;
      header.addEventListener("click", () => sortBy(table, column, header));
      header.addEventListener("keydown", (event) => { if (event.key === "Enter") sortBy(table, column, header); });
    });
  }

  function toCsv(table) {
    const quote = (s) => (/[",\n]/.test(s) ? '"' + s.replace(/"/g, '""') + '"' : s);
    return Array.from(table.rows).map((row) => Array.from(row.cells).map((c) => quote(text(c))).join(",")).join("\n") + "\n";
  }

  function button(label, action) {
    const element = document.createElement("button");
    element.type = "button";
    element.textContent = label;
    element.addEventListener("click", () => action(element));
    return element;
  }

  function download(table, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([toCsv(table)], { type: "text/csv" }));
    link.download = name + ".csv";
    link.click();
    URL.revokeObjectURL(link.href);
  }

  function addFilter(table, tools, count) {
    const rows = Array.from(table.tBodies[0].rows);
    const input = document.createElement("input");
    input.type = "search";
    input.placeholder = "Filter these " + rows.length + " rows";
    input.setAttribute("aria-label", input.placeholder);
    let verdict = "";
    const apply = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row) => {
        const badge = row.querySelector(".badge-verdict");
        const hit = words.every((w) => row.textContent.toLowerCase().includes(w)) && (!verdict || (badge && text(badge) === verdict));
        row.hidden = !hit;
        shown += hit ? 1 : 0;
      });
      count.textContent = shown === rows.length ? "" : shown + " of " + rows.length;
    };
    input.addEventListener("input", apply);
    tools.appendChild(input);
    const verdicts = new Set(rows.map((row) => row.querySelector(".badge-verdict")).filter(Boolean).map(text));
    const chips = Array.from(verdicts).sort().map((name) => button(name, (chip) => {
      verdict = verdict === name ? "" : name;
      chips.forEach((other) => other.setAttribute("aria-pressed", String(verdict !== "" && other === chip)));
      apply();
    }));
    chips.forEach((chip) => { chip.setAttribute("aria-pressed", "false"); tools.appendChild(chip); });
  }

  document.querySelectorAll("main table").forEach((table) => {
    if (!table.tHead || !table.tHead.rows.length || !table.tBodies.length || table.closest("table table")) return;
    const names = Array.from(table.tHead.rows[0].cells).map(text);
    Array.from(table.tBodies[0].rows).forEach((row) => Array.from(row.cells).forEach((cell, i) => { if (names[i]) cell.dataset.label = names[i]; }));
    const frame = document.createElement("div");
    frame.className = "scroll";
    table.parentNode.insertBefore(frame, table);
    frame.appendChild(table);
    const wrapper = table.closest(".sortable");
    if (!wrapper && table.tBodies[0].rows.length < 6) return;
    const grouped = table.querySelector("tbody [colspan]:not([colspan='1'])");
    if (table.tHead.rows.length === 1 && !grouped) makeSortable(table);
    if (!wrapper) return;
    const tools = document.createElement("div");
    tools.className = "table-tools";
    const count = document.createElement("span");
    count.className = "count";
    count.setAttribute("aria-live", "polite");
    if (table.closest(".filterable")) addFilter(table, tools, count);
    tools.appendChild(count);
    tools.appendChild(button("Download as CSV", () => download(table, wrapper.id || "table")));
    frame.parentNode.insertBefore(tools, frame);
  });
})();
