/**
 * Expert shift: how often two routers choose different experts for the same tokens (EAC-MoE section 3, change rates).
 */
import type { ShiftRates } from './options';

/** Counts over (token, layer) pairs; `rates` divides. */
export class ShiftCounter {
  tokens = 0;
  #all = 0;
  #any = 0;
  #half = 0;

  /** a, b: chosen experts, [n, k], in any order; -1 = none. */
  add(a: ArrayLike<number>, b: ArrayLike<number>, k: number): void {
    for (let t = 0; t < a.length; t += k) {
      let changed = 0;
      for (let i = t; i < t + k; i++) {
        let found = false;
        for (let j = t; j < t + k && !found; j++) found = a[i] === b[j];
        if (!found) changed++;
      }
      this.tokens++;
      if (changed > 0) this.#any++;
      if (2 * changed >= k) this.#half++;
      if (changed === k) this.#all++;
    }
  }

  rates(): ShiftRates {
    const n = Math.max(1, this.tokens);
    return { changedAll: this.#all / n, changedAny: this.#any / n, changedHalf: this.#half / n };
  }
}
