// Behaviour of the site where there is no Quarto: theme, menu, search, the list of headings, all code at once.
(function () {
  "use strict";
  const one = (selector) => document.querySelector(selector);

  one(".theme").addEventListener("click", () => {
    const dark = document.body.className !== "quarto-dark";
    document.body.className = dark ? "quarto-dark" : "quarto-light";
    try { localStorage.setItem("medaug-theme", dark ? "dark" : "light"); } catch (e) { /* private window */ }
  });

  one(".menu").addEventListener("click", (event) => {
    const open = one(".pages").classList.toggle("open");
    event.currentTarget.setAttribute("aria-expanded", String(open));
    if (open) window.scrollTo(0, 0);
  });

  const all = one(".code-all button");
  if (all) {
    all.addEventListener("click", () => {
      const folds = document.querySelectorAll("details.code-fold");
      const open = Array.from(folds).some((fold) => !fold.open);
      folds.forEach((fold) => { fold.open = open; });
      all.textContent = open ? "Hide all code" : "Show all code";
    });
  }

  // The index is a script, not JSON: pages opened from a folder may load scripts, but not fetch files.
  const input = one(".search input");
  const list = one(".search ol");
  const root = input.dataset.root;
  let loading = null;
  const load = () => loading || (loading = new Promise((resolve) => {
    const script = document.createElement("script");
    script.src = root + "search.js";
    script.onload = resolve;
    document.head.appendChild(script);
  }));
  const excerpt = (text, word) => {
    const at = Math.max(text.toLowerCase().indexOf(word), 0);
    return (at > 50 ? "…" : "") + text.slice(Math.max(at - 50, 0), at + 110) + "…";
  };
  const show = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    list.replaceChildren();
    list.hidden = !words.length;
    if (!words.length) return;
    const hits = window.SEARCH.map((entry) => {
      const head = (entry.page + " " + entry.heading).toLowerCase();
      const body = entry.text.toLowerCase();
      if (!words.every((w) => head.includes(w) || body.includes(w))) return null;
      return { entry, score: words.reduce((s, w) => s + (head.includes(w) ? 3 : 0) + (body.includes(w) ? 1 : 0), 0) };
    }).filter(Boolean).sort((a, b) => b.score - a.score).slice(0, 12);
    hits.forEach(({ entry }) => {
      const item = document.createElement("li");
      const link = document.createElement("a");
      const small = document.createElement("small");
      link.href = root + entry.address;
      link.textContent = entry.heading && entry.heading !== entry.page ? entry.page + " · " + entry.heading : entry.page;
      small.textContent = excerpt(entry.text, words[0]);
      link.appendChild(small);
      item.appendChild(link);
      list.appendChild(item);
    });
    if (!hits.length) {
      const item = document.createElement("li");
      item.textContent = "Nothing found.";
      item.style.padding = ".5rem .6rem";
      list.appendChild(item);
    }
  };
  input.addEventListener("focus", load);
  input.addEventListener("input", () => load().then(show));
  input.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { input.value = ""; list.hidden = true; }
    if (event.key === "Enter" && list.querySelector("a")) list.querySelector("a").click();
  });
  document.addEventListener("click", (event) => { if (!event.target.closest(".search")) list.hidden = true; });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !/INPUT|TEXTAREA/.test(document.activeElement.tagName)) { event.preventDefault(); input.focus(); }
  });

  const entries = new Map(Array.from(document.querySelectorAll(".toc a")).map((a) => [decodeURIComponent(a.hash.slice(1)), a]));
  const heads = Array.from(entries.keys()).map((id) => document.getElementById(id)).filter(Boolean);
  const mark = () => {
    const above = heads.filter((head) => head.getBoundingClientRect().top < 120);
    const current = above.length ? above[above.length - 1] : heads[0];
    entries.forEach((a, id) => a.classList.toggle("here", Boolean(current) && id === current.id));
  };
  if (heads.length) { document.addEventListener("scroll", mark, { passive: true }); mark(); }
})();
