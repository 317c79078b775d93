// In gr.HTML's js_on_load: iframes with player.html, and messages to and from them. props.value is a JSON list, one message
// a pane or null. The frames are sandboxed without an origin: nothing that is shown in one can reach this page.
const frames = [];
const language = () => props.labels[document.documentElement.lang] ? document.documentElement.lang : "en";
const dark = () => document.body.classList.contains("dark");
const post = (frame, message) => frame.ready ? frame.contentWindow.postMessage(message, "*") : frame.waiting.push(message);
for (let i = 0; i < props.panes; i++) {
  const frame = document.createElement("iframe");
  frame.sandbox = "allow-scripts";
  frame.title = "player";
  frame.waiting = [];
  frame.style.cssText = "flex: 1 1 340px; min-width: 0; border: 0; height: 260px; border-radius: 12px; color-scheme: normal;";
  frame.srcdoc = props.page;
  frames.push(frame);
}
element.querySelector(".stage").replaceChildren(...frames);

addEventListener("message", ({ source, data }) => {
  const frame = frames.find(f => f.contentWindow === source);
  if (!frame || !data) return;
  if (data.ready) {
    frame.ready = true;
    post(frame, { lang: language(), dark: dark(), edit: props.edit });
    for (const message of frame.waiting.splice(0)) post(frame, message);
  }
  if (data.height > 0) frame.style.height = `${Math.min(4000, Math.ceil(data.height) + 2)}px`;
  if (data.again) trigger("again", data.again);
});

const shown = [];
const show = () => {
  const messages = props.value ? JSON.parse(props.value) : [];
  messages.forEach((message, i) => {
    if (!message || !frames[i] || shown[i] === JSON.stringify(message)) return;
    shown[i] = JSON.stringify(message);
    post(frames[i], message);
  });
};
watch("value", show);
const replay = element.querySelector(".replay");
const speak = () => {
  frames.forEach(frame => post(frame, { lang: language() }));
  if (replay) replay.textContent = props.labels[language()];
};
new MutationObserver(speak).observe(document.documentElement, { attributeFilter: ["lang"] });
new MutationObserver(() => frames.forEach(frame => post(frame, { dark: dark() })))
  .observe(document.body, { attributeFilter: ["class"] });
show();
speak();

// one clock for all panes: each shows what it had after the same time
if (replay) replay.onclick = () => {
  const last = Math.max(...shown.map(s => JSON.parse(s).trace?.steps.at(-1)?.seconds ?? 0));
  const start = performance.now(), pace = Math.min(1, Math.max(.1, last / 4));  // short races in slow motion
  const tick = now => {
    const clock = (now - start) / 1000 * pace;
    replay.nextElementSibling.textContent = `${Math.min(clock, last).toFixed(2)} s`;
    for (const frame of frames) post(frame, { clock });
    if (clock < last) requestAnimationFrame(tick);
  };
  requestAnimationFrame(tick);
};
