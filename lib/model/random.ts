/**
 * A small seeded generator (sfc32, by Chris Doty-Humphrey) for sampling: the same seed gives the same numbers on every machine.
 */
export function seededRandom(seed: number): () => number {
  let [a, b, c, d] = [0x9e3779b9, seed >>> 0, Math.floor(seed / 2 ** 32) >>> 0, 1];
  const next = () => {
    const t = (((a + b) | 0) + d) | 0;
    d = (d + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = ((c << 21) | (c >>> 11)) + t;
    return (t >>> 0) * 2 ** -32;
  };
  for (let i = 0; i < 16; i++) next();
  return next;
}
