/** Recording programs for the native runtime (types/native.d.ts, native/program). */
import type { Device, Op, Program, Register, RegisterSpec } from '../../types/native';
import { native } from '../native';

/** Operations [from, to) of a program. */
export interface Range {
  from: number;
  to: number;
}

export class ProgramBuilder {
  readonly #registers: RegisterSpec[] = [];
  readonly #named = new Map<string, Register>();
  readonly #ops: Op[] = [];

  /** The register of that name and shape, made on first use: layers of equal shape share their registers. */
  register(
    name: string,
    width: number,
    dtype: RegisterSpec['dtype'] = 'f32',
    rows: RegisterSpec['rows'] = 'tokens',
  ): Register {
    const key = `${name}:${width}:${dtype}:${rows}`;
    let register = this.#named.get(key);
    if (register === undefined) {
      register = this.#registers.push({ width, dtype, rows }) - 1;
      this.#named.set(key, register);
    }
    return register;
  }

  /** Operations so far. */
  get length(): number {
    return this.#ops.length;
  }

  push(op: Op): void {
    this.#ops.push(op);
  }

  /** Records what `record` pushes and returns its range. */
  stage(record: () => void): Range {
    const from = this.#ops.length;
    record();
    return { from, to: this.#ops.length };
  }

  build(device: Device = 'cpu'): Program {
    return native().createProgram(this.#registers, this.#ops, device);
  }
}
