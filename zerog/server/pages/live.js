// Keeps a page up to date: when a stream says that something has changed, the page is fetched again, at most once a
// second, and what it shows is put in place.  Nothing is kept but what is shown.
"use strict";

(() => {
  const main = document.querySelector("main[data-changes], main[data-progress]");
  if (!main || !window.EventSource) return;
  let busy = false;
  let due = false;
  const sources = [];

  async function refresh() {
    if (busy) {
      due = true;
      return;
    }
    busy = true;
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" }, cache: "no-store" });
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.querySelector("main");
      if (answer.ok && fresh) main.replaceChildren(...fresh.childNodes);
    } catch {
      due = true; // the server is away: once more when it is back
    }
    setTimeout(() => {
      busy = false;
      if (due) {
        due = false;
        refresh();
      }
    }, 1000);
  }

  function progress(message) {
    const view = JSON.parse(message.data);
    const bar = main.querySelector("progress");
    if (bar) bar.value = view.completeness;
    const text = main.querySelector("[data-percent]");
    if (text) text.textContent = `${Math.round(100 * view.completeness)} %`;
    const said = main.querySelector("[data-message]");
    if (said) said.textContent = view.message ? `\u00b7 ${view.message}` : "";
    const state = main.querySelector("[data-state]");
    if (state && state.dataset.state !== view.state) refresh();
    if (["succeeded", "failed", "cancelled"].includes(view.state)) {
      sources.forEach((source) => source.close());
      refresh();
    }
  }

  function listen(url, name, heard) {
    const source = new EventSource(url);
    source.addEventListener(name, heard);
    sources.push(source);
  }

  if (main.dataset.progress) listen(main.dataset.progress, "progress", progress);
  if (main.dataset.changes) {
    let first = true; // the first event says what is shown already
    listen(main.dataset.changes, "change", () => {
      if (!first) refresh();
      first = false;
    });
  }
})();
