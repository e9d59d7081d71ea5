"use strict";

const KEYS = "1234567890-=";
const $ = (id) => document.getElementById(id);

let state = null;      // what the server last said
let group = null;      // the group on the page, one of state.groups
let draft = null;      // its votes so far, not sent yet
let drafts = new Map();
let sent = [];         // keys of groups answered here, the latest last
let sending = false;

const ranking = () => state.mode === "rank";
const size = () => group.order.length;
const voted = () => (ranking() ? draft.ranked.length : draft.thumbs.filter((vote) => vote !== null).length);
const least = () => (ranking() ? Math.min(2, size()) : 1);

// Drafts. Samples are numbered as shown, from 0; the server's order is group.order.

function newDraft(group, mode) {
  const votes = group.order.map((index) => (group.votes ? group.votes[index] : null));
  const chosen = votes.map((vote, i) => i).filter((i) => votes[i] !== null).sort((a, b) => votes[a] - votes[b]);
  const ranked = chosen.map((i, at) => ({ i, tie: at > 0 && votes[i] === votes[chosen[at - 1]] }));
  return { ranked: mode === "rank" ? ranked : [], thumbs: votes, tie: false, page: 0, current: 0, past: [] };
}

/** Place of each sample shown, 0 = best; those who tie share the best place among them. */
function places() {
  const found = group.order.map(() => null);
  draft.ranked.forEach(({ i, tie }, at) => { found[i] = tie && at > 0 ? found[draft.ranked[at - 1].i] : at; });
  return found;
}

function remember() {
  draft.past.push(JSON.stringify([draft.ranked, draft.thumbs]));
}

function rank(i) {
  remember();
  const at = draft.ranked.findIndex((entry) => entry.i === i);
  if (at >= 0) {
    const [gone] = draft.ranked.splice(at, 1);
    if (draft.ranked[at] && !gone.tie) draft.ranked[at].tie = false;
    say(`Sample ${i + 1} has no place`);
  } else {
    draft.ranked.push({ i, tie: draft.tie && draft.ranked.length > 0 });
    say(`Sample ${i + 1}: place ${places()[i] + 1}`);
  }
  draft.tie = false;
  draft.current = i;
  render();
  if (voted() === size()) $("done").focus();
}

function thumb(i, vote) {
  remember();
  draft.thumbs[i] = draft.thumbs[i] === vote ? null : vote;
  say(`Sample ${i + 1}: ${draft.thumbs[i] === null ? "no vote" : vote ? "good" : "bad"}`);
  draft.current = i;
  render();
}

function undo() {
  if (!draft.past.length) return;
  [draft.ranked, draft.thumbs] = JSON.parse(draft.past.pop());
  draft.tie = false;
  say("Undone");
  render();
}

function toggleTie() {
  if (!ranking() || !draft.ranked.length || voted() === size()) return;
  draft.tie = !draft.tie;
  say(draft.tie ? "The next sample shares the last one's place" : "No tie");
  render();
}

function move(to) {
  draft.current = Math.max(0, Math.min(size() - 1, to));
  draft.page = Math.floor(draft.current / state.per_page);
  render();
  document.querySelector(`[data-sample="${draft.current}"] .choose`).focus();
}

function turn(by) {
  const page = draft.page + by;
  if (page >= 0 && page * state.per_page < size()) move(page * state.per_page);
}

// The server.

async function poll() {
  try {
    const answer = await fetch("state");
    if (!answer.ok) throw new Error((await answer.json()).error);
    state = await answer.json();
    trouble("");
    choose();
  } catch (error) {
    trouble(error instanceof TypeError ? "The run cannot be reached: it has ended, or the connection is lost. "
      + "Votes that were sent are kept." : error.message);
  }
  setTimeout(poll, group ? 3000 : 1000);
}

/** Keep the group on the page while it is open; else the first without an answer. */
function choose(key = group && group.key) {
  const open = state.groups.find((other) => other.key === key) || state.groups.find((other) => !other.answered);
  sent = sent.filter((old) => state.groups.some((other) => other.key === old));
  if (!open || !group || open.key !== group.key) show(open || null);
  else { group = open; progress(); }
}

function show(next) {
  group = next;
  if (group) {
    if (!drafts.has(group.key)) drafts.set(group.key, newDraft(group, state.mode));
    draft = drafts.get(group.key);
    $("prompt").textContent = group.prompt;
    build();
    render();
    say(`Prompt: ${group.prompt}`);
    window.scrollTo(0, 0);
    document.querySelector(".choose").focus({ preventScroll: true, focusVisible: false });
  }
  for (const id of ["question", "actions"]) $(id).hidden = !group;
  $("idle").hidden = Boolean(group);
  progress();
  layout();
}

async function send(body) {
  if (sending || !group) return;
  sending = true;
  const key = group.key;
  try {
    const answer = await fetch("vote", { method: "POST", body: JSON.stringify({ group: key, ...body }) });
    if (!answer.ok) throw new Error((await answer.json()).error);
    trouble("");
    const mine = state.groups.find((other) => other.key === key);
    if (mine) { mine.answered = true; mine.votes = body.votes || null; }
    sent = [...sent.filter((old) => old !== key), key];
    drafts.delete(key);
    show(state.groups.find((other) => !other.answered) || null);
  } catch (error) {
    trouble(error instanceof TypeError ? "The vote was not sent: the run cannot be reached." : error.message);
  }
  sending = false;
}

function done() {
  if (voted() < least()) return;
  const told = ranking() ? places() : draft.thumbs;
  const votes = group.order.map(() => null);
  group.order.forEach((index, i) => { votes[index] = told[i]; });
  send({ votes });
}

function back() {
  const before = sent.filter((key) => !group || key !== group.key).pop();
  const open = before && state.groups.find((other) => other.key === before);
  if (open) { sent = sent.filter((key) => key !== before); show(open); }
}

// What is seen. All words from the run enter as text, never as markup.

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function build() {
  $("samples").replaceChildren(...group.order.map((index, i) => {
    const image = element("img", { src: `media/${group.key}/${index}`, alt: "", width: group.width, height: group.height });
    const pick = element("button", { class: "choose" }, image);
    pick.addEventListener("click", () => (ranking() ? rank(i) : focusOn(i)));
    pick.addEventListener("focus", () => { draft.current = i; mark(); });
    const zoom = element("button", { class: "zoom", "aria-label": `Enlarge sample ${i + 1}` }, "⤢");
    zoom.addEventListener("click", () => enlarge(i));
    const item = element("li", { "data-sample": i }, pick, zoom);
    if (KEYS[i % state.per_page]) item.append(element("span", { class: "key", "aria-hidden": "true" }, KEYS[i % state.per_page]));
    item.append(ranking() ? element("span", { class: "place", "aria-hidden": "true" }) : thumbs(i));
    return item;
  }));
  $("samples").classList.toggle("pixelated", Math.max(group.width, group.height) <= 128);
}

function thumbs(i) {
  const row = element("div", { class: "thumbs" });
  for (const [vote, name] of [[1, "Good"], [0, "Bad"]]) {
    const icon = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
    use.setAttribute("href", "#thumb");
    icon.append(use);
    icon.setAttribute("aria-hidden", "true");
    const button = element("button", { class: name.toLowerCase(), "aria-label": `Sample ${i + 1}: ${name.toLowerCase()}` }, icon, element("span", {}, name));
    button.addEventListener("click", () => thumb(i, vote));
    row.append(button);
  }
  return row;
}

function focusOn(i) {
  draft.current = i;
  mark();
}

function render() {
  const found = ranking() ? places() : draft.thumbs;
  const first = draft.page * state.per_page;
  for (const item of $("samples").children) {
    const i = Number(item.dataset.sample), vote = found[i];
    item.hidden = i < first || i >= first + state.per_page;
    item.classList.toggle("voted", ranking() && vote !== null);
    item.classList.toggle("up", !ranking() && vote === 1);
    item.classList.toggle("down", !ranking() && vote === 0);
    const told = vote === null ? "no vote yet" : ranking() ? `place ${vote + 1}` : vote ? "good" : "bad";
    item.querySelector(".choose").setAttribute("aria-label", `Sample ${i + 1} of ${size()}, ${told}`);
    if (ranking()) {
      const badge = item.querySelector(".place");
      badge.hidden = vote === null;
      badge.textContent = vote === null ? "" : `${found.filter((other) => other === vote).length > 1 ? "=" : ""}${vote + 1}`;
    } else {
      item.querySelector(".good").setAttribute("aria-pressed", vote === 1);
      item.querySelector(".bad").setAttribute("aria-pressed", vote === 0);
    }
  }
  $("task").textContent = ranking()
    ? `Choose from best to worst: ${voted()} of ${size()} placed. Those left out get no score.`
    : `Good or bad for this prompt? ${voted()} of ${size()} judged. Those left out get no score.`;
  $("keys").textContent = ranking()
    ? "Keys: the number on a sample places it; arrows move, Space chooses, Z enlarges, Enter sends when all are placed."
    : "Keys: arrows left and right move, up = good, down = bad (or the number, then G or N), Z enlarges.";
  const pages = Math.ceil(size() / state.per_page);
  $("pages").hidden = pages < 2;
  $("page").textContent = `${draft.page + 1} of ${pages}`;
  $("page-back").disabled = draft.page === 0;
  $("page-on").disabled = draft.page === pages - 1;
  $("undo").disabled = !draft.past.length;
  $("tie").hidden = !ranking();
  $("tie").disabled = !draft.ranked.length || voted() === size();
  $("tie").setAttribute("aria-pressed", draft.tie);
  $("done").disabled = voted() < least();
  mark();
  layout();
}

/** Thumbs by key need to know where: the current sample is outlined. */
function mark() {
  for (const item of $("samples").children) item.classList.toggle("current", !ranking() && Number(item.dataset.sample) === draft.current);
}

function progress() {
  const total = state.groups.length, answered = state.groups.filter((other) => other.answered).length;
  $("progress").hidden = !total;
  $("progress").max = total || 1;
  $("progress").value = answered;
  $("count").textContent = total ? `${answered} of ${total} groups answered` : "Waiting for the run";
  $("left").hidden = state.seconds_left === null;
  $("left").textContent = state.seconds_left === null ? "" : `${Math.round(state.seconds_left)} s left`;
  $("back").disabled = !sent.some((key) => !group || key !== group.key);
  document.title = total > answered ? `(${total - answered}) Votes · dancegrpo` : "Votes · dancegrpo";
}

/** As many columns as show the whole page of samples at the largest size; on a phone two, and one scrolls. */
function layout() {
  if (!group) return;
  const grid = $("samples"), gap = 12, shown = Math.min(state.per_page, size());
  const width = grid.clientWidth, extra = ranking() ? 4 : 68;
  const height = window.innerHeight - grid.getBoundingClientRect().top - window.scrollY - $("actions").offsetHeight - 18;
  let best = Math.min(shown, Math.max(2, Math.floor(width / 240)));
  let widest = 0;
  for (let columns = 1; columns <= shown; columns++) {
    const wide = (width - gap * (columns - 1)) / columns, rows = Math.ceil(shown / columns);
    const tall = (height - gap * (rows - 1)) / rows - extra;
    const fits = Math.min(wide, (tall * group.width) / group.height);
    if (fits > widest && fits >= 130) { widest = fits; best = columns; }
  }
  grid.style.setProperty("--columns", best);
  grid.style.maxWidth = widest ? `${Math.ceil(widest * best + gap * (best - 1))}px` : "";
}

function enlarge(i) {
  const image = $("large").querySelector("img");
  image.src = `media/${group.key}/${group.order[i]}`;
  image.alt = `Sample ${i + 1}`;
  image.style.imageRendering = Math.max(group.width, group.height) <= 128 ? "pixelated" : "";
  $("large").showModal();
}

function trouble(text) {
  $("trouble").hidden = !text;
  $("trouble").textContent = text;
}

function say(text) {
  $("said").textContent = text;
}

// Keys.

const PRESSED = {
  u: undo, Backspace: undo, t: toggleTie, s: () => send({ skipped: true }), d: done, b: back,
  z: () => enlarge(draft.current), PageDown: () => turn(1), PageUp: () => turn(-1),
  ArrowRight: () => move(draft.current + 1), ArrowLeft: () => move(draft.current - 1),
};
const THUMBS = {
  ArrowUp: () => vote(1), g: () => vote(1), ArrowDown: () => vote(0), n: () => vote(0),
};

/** A thumb by key goes on to the next sample. */
function vote(value) {
  const i = draft.current;
  thumb(i, value);
  if (i + 1 < size()) move(i + 1);
  else if (voted() === size()) $("done").focus();
}

document.addEventListener("keydown", (event) => {
  if (!state || !group || $("large").open || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const at = KEYS.indexOf(key), i = draft.page * state.per_page + at;
  if (at >= 0 && at < state.per_page && i < size()) ranking() ? rank(i) : move(i);
  else if (!ranking() && THUMBS[key]) THUMBS[key]();
  else if (PRESSED[key]) PRESSED[key]();
  else return;
  event.preventDefault();
});

for (const [id, action] of Object.entries({ back, undo, tie: toggleTie, skip: () => send({ skipped: true }), done, "page-back": () => turn(-1), "page-on": () => turn(1) })) {
  $(id).addEventListener("click", action);
}
window.addEventListener("resize", layout);
poll();
