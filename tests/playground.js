// What tests ask of the page: its own functions, called as its buttons call them.
({
  everything(tokens, label, wrong, others) {
    const own = model.forward(tokens);
    const near = references.near(tokens);
    const along = (loss) => ngd(own.pathway, loss, settings);
    const neighbours = neighbourLoss(model, references, near);
    const methods = {
      ngd: along(neighbours),
      kernel_regression: kernelRegression(own.pathway, neighbours, near, references),
      mode_finding: modeFinding(own.pathway, near, references, settings),
      oracle: along(answerLoss(model, tokens, label)),
      "a wrong answer": along(answerLoss(model, tokens, wrong)),
      "random neighbours": along(neighbourLoss(model, references, { ...near, places: others })),
    };
    const answers = { own: this.answer(tokens, own.pathway) };
    for (const [name, method] of Object.entries(methods)) {
      answers[name] = this.answer(tokens, finish(method));
    }
    return { answers, near: near.places };
  },

  answer(tokens, pathway) {
    const { logits } = model.forward(tokens, pathway);
    return { pathway: pathway.map((row) => [...row]), logits: [...logits] };
  },

  gradient(tokens, label, pathway) {
    const rows = pathway.map((row) => Float64Array.from(row));
    const gradient = answerLoss(model, tokens, label)(rows).gradient();
    return {
      own: [...model.forward(tokens).logits],
      logits: [...model.forward(tokens, rows).logits],
      rows: gradient.map((row) => [...row]),
    };
  },
})
