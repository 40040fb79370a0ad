"use strict";
const menu = document.getElementById("pairs");
if (menu) {
  const show = () => {
    for (const pair of document.querySelectorAll(".pair")) {
      pair.hidden = pair.id !== menu.value;
    }
  };
  menu.addEventListener("change", show);
  show();
}
