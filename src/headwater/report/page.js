// A larger view of a picture, on click or Enter. Without scripts the page says everything it has to say.
(() => {
  const dialog = document.createElement("dialog");
  if (!dialog.showModal) return;
  dialog.className = "large";
  dialog.addEventListener("click", () => dialog.close());
  document.body.append(dialog);
  const show = (image) => {
    dialog.replaceChildren(image.cloneNode());
    dialog.setAttribute("aria-label", image.alt);
    dialog.showModal();
  };
  for (const picture of document.querySelectorAll(".picture")) {
    const image = picture.firstElementChild;
    picture.tabIndex = 0;
    picture.setAttribute("role", "button");
    picture.setAttribute("aria-label", image.alt + ", enlarge");
    picture.addEventListener("click", () => show(image));
    picture.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      show(image);
    });
  }
})();
