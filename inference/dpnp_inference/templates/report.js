"use strict";
(() => {
  const details = [...document.querySelectorAll("details")];
  addEventListener("beforeprint", () => details.forEach((part) => { part.open = true; }));
  const copy = document.getElementById("copy");
  copy.hidden = !navigator.clipboard;
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById("command").textContent);
    copy.textContent = "copied";
  });
  const slider = document.getElementById("slider");
  if (!slider) return;
  const thumbs = [...document.querySelectorAll("#strip button")];
  const picture = document.getElementById("draw");
  const label = document.getElementById("draw-label");
  const play = document.getElementById("play");
  const speed = document.getElementById("speed");
  let timer = 0;
  const show = (i) => {
    const thumb = thumbs[i].firstElementChild;
    picture.src = thumb.src;
    picture.alt = thumb.alt;
    label.textContent = `${thumb.title} (${i + 1} of ${thumbs.length})`;
    slider.value = String(i);
    slider.setAttribute("aria-valuetext", thumb.title);
    thumbs.forEach((other, j) => other.setAttribute("aria-pressed", String(i === j)));
  };
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "▶ play"; };
  const start = () => {
    clearInterval(timer);
    timer = setInterval(() => show((Number(slider.value) + 1) % thumbs.length), 1000 / Number(speed.value));
    play.textContent = "❚❚ pause";
  };
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  play.addEventListener("click", () => (timer ? stop() : start()));
  speed.addEventListener("input", () => { if (timer) start(); });
  thumbs.forEach((thumb, i) => thumb.addEventListener("click", () => { stop(); show(i); }));
  show(0);
})();
