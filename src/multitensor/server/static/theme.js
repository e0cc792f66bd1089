// Runs before anything is drawn, so that a dark page never flashes white.
"use strict";
try {
  const theme = localStorage.getItem("multitensor.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // storage may be forbidden: then the system's choice holds
}
