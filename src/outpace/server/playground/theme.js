// Runs before the first paint, so that a chosen theme does not flash. Without a choice the system's preference holds.
try {
  const chosen = localStorage.getItem("outpace.theme");
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
} catch {
  // storage is blocked: the system's preference it is
}
