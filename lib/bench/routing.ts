/** Which experts the tokens of a benchmark choose: seeded, and known beforehand, so that the bytes touched can be counted. */

/** The numbers 0 to n - 1 in random order. */
export function shuffled(n: number, random: () => number): Int32Array {
  const order = Int32Array.from({ length: n }, (_, i) => i);
  for (let i = n - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [order[i], order[j]] = [order[j]!, order[i]!];
  }
  return order;
}

/** Uniform routing: each token chooses `topK` different experts. [tokens, topK] */
export function uniformRouting(
  tokens: number,
  experts: number,
  topK: number,
  random: () => number,
): Int32Array {
  const indices = new Int32Array(tokens * topK);
  const deck = shuffled(experts, random);
  for (let t = 0; t < tokens; t++) {
    for (let k = 0; k < topK; k++) {
      const j = k + Math.floor(random() * (experts - k));
      [deck[k], deck[j]] = [deck[j]!, deck[k]!];
      indices[t * topK + k] = deck[k]!;
    }
  }
  return indices;
}

/**
 * Uniform routing of single tokens that come back to an expert as late as can be: a shuffled deck is dealt, topK cards a token, and a new one
 * begun when fewer are left. So weights come from memory, not from a cache that held them since the last token.
 */
export function rotatingRouting(experts: number, topK: number, random: () => number): () => Int32Array {
  let deck: Int32Array = new Int32Array(0);
  return () => {
    if (deck.length < topK) deck = shuffled(experts, random);
    const dealt = deck.slice(0, topK);
    deck = deck.subarray(topK);
    return dealt;
  };
}

/**
 * Routing in which expert e gets the share loads[e] of the choices (loads sum to 1): systematic sampling, in which a token chooses expert e
 * with probability topK * loads[e] exactly, and never twice. A load above 1 / topK is cut to that and the rest spread over the others.
 */
export function loadedRouting(
  tokens: number,
  loads: Float64Array,
  topK: number,
  random: () => number,
): Int32Array {
  const chances = inclusionProbabilities(loads, topK);
  const indices = new Int32Array(tokens * topK);
  for (let t = 0; t < tokens; t++) {
    const order = shuffled(loads.length, random);
    const start = random();
    let [sum, chosen] = [0, 0];
    for (const e of order) {
      sum += chances[e]!;
      if (chosen < topK && sum > start + chosen) indices[t * topK + chosen++] = e;
    }
    // Rounding may leave the last choice out: the first expert of the order that was not chosen.
    for (const e of order) {
      if (chosen === topK) break;
      if (!indices.subarray(t * topK, t * topK + chosen).includes(e)) indices[t * topK + chosen++] = e;
    }
  }
  return indices;
}

/** topK * loads, cut at 1, with what was cut spread in proportion. */
export function inclusionProbabilities(loads: Float64Array, topK: number): Float64Array {
  const chances = new Float64Array(loads.length);
  const full = new Set<number>();
  for (;;) {
    const free = loads.reduce((sum, load, e) => (full.has(e) ? sum : sum + load), 0);
    const left = topK - full.size;
    let again = false;
    loads.forEach((load, e) => {
      if (full.has(e)) return;
      chances[e] = free > 0 ? (load / free) * left : left / (loads.length - full.size);
      if (chances[e] > 1) {
        chances[e] = 1;
        full.add(e);
        again = true;
      }
    });
    if (!again) return chances;
  }
}
