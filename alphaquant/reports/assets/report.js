"use strict";
const content = JSON.parse(document.getElementById("data").textContent);
const said = document.getElementById("said");
let hiding = 0;

// Says what was copied, or shows the command to copy by hand.
function say(text, command) {
  said.textContent = text + " ";
  said.appendChild(document.createElement("code")).textContent = command;
  said.hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(() => { said.hidden = true; }, 8000);
}

// The way of pages that are not served safely, where browsers have no clipboard interface.
function copyBySelection(text) {
  const area = document.createElement("textarea");
  area.value = text;
  area.style.position = "fixed";
  document.body.appendChild(area);
  area.select();
  let isCopied = false;
  try { isCopied = document.execCommand("copy"); } catch (error) { isCopied = false; }
  area.remove();
  return isCopied;
}

async function copy(command) {
  let isCopied = false;
  try {
    await navigator.clipboard.writeText(command);
    isCopied = true;
  } catch (error) {
    isCopied = copyBySelection(command);
  }
  say(isCopied ? "Copied:" : "Copy this:", command);
}

const isWide = window.innerWidth > 700;
for (const [name, figure] of Object.entries(content.figures)) {
  const place = document.getElementById("figure-" + name);
  place.textContent = "";
  const options = { responsive: true, displaylogo: false, displayModeBar: isWide ? "hover" : false };
  Plotly.newPlot(place, figure.data, figure.layout, options);
  if (name === "front") {
    place.on("plotly_click", (event) => {
      const command = content.commands[event.points[0].customdata];
      if (command) copy(command);
    });
  }
}
for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", () => copy(button.dataset.command));
}
