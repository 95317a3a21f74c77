"""The page on which people judge: HTML, style and script. Texts come as JSON, and are set as text, never as HTML."""

HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Which answer is better?</title>
<link rel="stylesheet" href="/page.css">
<script src="/page.js" defer></script>
</head>
<body>
<header><h1>Which answer is better?</h1><p id="progress" role="status"></p></header>
<main id="look" hidden>
<section id="prompt" aria-label="Prompt"></section>
<div id="answers">
<section aria-labelledby="name1"><h2 id="name1">Answer 1</h2><div id="first" class="text"></div></section>
<section aria-labelledby="name2"><h2 id="name2">Answer 2</h2><div id="second" class="text"></div></section>
</div>
<nav aria-label="Verdict">
<button type="button" data-choice="1">1 · the first</button>
<button type="button" data-choice="0">0 · a tie</button>
<button type="button" data-choice="2">2 · the second</button>
<button type="button" id="back">b · the one before</button>
</nav>
</main>
<p id="word" role="alert"></p>
</body>
</html>
"""

STYLE = """body { max-width: 72rem; margin: 1rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; }
body { color: #222; background: #fff; }
header { display: flex; justify-content: space-between; align-items: baseline; gap: 1rem; flex-wrap: wrap; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 0 0 .5rem; }
.text, .turn { white-space: pre-wrap; overflow-wrap: anywhere; }
.turn { background: #f5f5f5; padding: .6rem 1rem; margin: .4rem 0; }
.turn b { display: block; font-weight: 600; color: #555; }
#answers { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin: 1rem 0; }
#answers section { border: 1px solid #ccc; padding: 1rem; }
@media (max-width: 40rem) { #answers { grid-template-columns: 1fr; } }
nav { display: flex; gap: .6rem; flex-wrap: wrap; position: sticky; bottom: 0; background: #fff; padding: .6rem 0; }
button { font: inherit; padding: .5rem 1.2rem; border: 1px solid #888; background: #fff; cursor: pointer; }
button:hover, button:focus-visible { background: #eef4f8; outline: 2px solid #2a6f97; }
#back { margin-left: auto; border-color: #ccc; color: #555; }
#word { color: #a33; }
"""

SCRIPT = """"use strict";
const at = id => document.getElementById(id);
let look = null, before = [], busy = false;

function say(word) { at("word").textContent = word; }

function show(state) {
  look = state.look;
  at("progress").textContent = state.done + " of " + state.total + " judged";
  at("look").hidden = look === null;
  if (look === null) { say(state.done === state.total ? "All is judged. Thank you." : ""); return; }
  const turns = look.prompt.map(turn => {
    const box = document.createElement("div"), who = document.createElement("b");
    box.className = "turn";
    who.textContent = turn.role;
    box.append(who, document.createTextNode(turn.content));
    return box;
  });
  at("prompt").replaceChildren(...turns);
  at("first").textContent = look.first;
  at("second").textContent = look.second;
  window.scrollTo(0, 0);
}

async function call(path, body) {
  if (busy) return;
  busy = true;
  try {
    const options = body === undefined ? {} :
      {method: "POST", headers: {"content-type": "application/json"}, body: JSON.stringify(body)};
    const answer = await fetch(path, options);
    if (!answer.ok) { say((await answer.text()) || "The server answered " + answer.status); return; }
    say("");
    show(await answer.json());
  } catch (error) {
    say("The server does not answer: it has ended, or was stopped. What was judged is kept.");
  } finally { busy = false; }
}

function judge(choice) {
  if (look === null || busy) return;
  before.push(look.number);
  call("/verdict", {look: look.number, choice: choice});
}

function back() {
  if (before.length && !busy) call("/look?number=" + before.pop());
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  if (["0", "1", "2"].includes(event.key)) { event.preventDefault(); judge(Number(event.key)); }
  if (event.key === "b") back();
});
for (const button of document.querySelectorAll("[data-choice]"))
  button.addEventListener("click", () => judge(Number(button.dataset.choice)));
at("back").addEventListener("click", back);
call("/look");
"""
