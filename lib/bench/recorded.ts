/** Cases that are recorded programs, and the frames and tensors that they own. */
import type { Activations, Frame, KvCache, Program, Sequence } from '../../types/native';
import { createFrame, ProgramBuilder, type Matrix, type Register, type Tensor } from '../kernels';
import type { Case, Group } from './case';

interface Disposable {
  dispose(): void;
}

/** A program under construction whose every operation is one call of a case. */
export class Recorder {
  readonly builder = new ProgramBuilder();
  readonly #bindings: [Register, Tensor][] = [];

  /** A register whose memory is `tensor`, which belongs to the case from now on. */
  bound(name: string, tensor: Tensor): Register {
    const { dtype, shape } = tensor;
    const register = this.builder.register(name, shape.at(-1)!, dtype === 'i32' ? 'i32' : 'f32');
    this.#bindings.push([register, tensor]);
    return register;
  }

  /** A frame with a batch of these sequences begun, ready to run. */
  start(
    sequences: Sequence[],
    activations: Activations = 'float32',
  ): { frame: Frame; program: Program } & Disposable {
    const program = this.builder.build();
    const frame = createFrame(program);
    for (const [register, tensor] of this.#bindings) frame.bind(register, tensor);
    frame.setActivations(activations);
    frame.begin(null, sequences);
    const dispose = () => {
      frame.dispose();
      program.dispose();
      for (const [, tensor] of this.#bindings) tensor.dispose();
    };
    return { frame, program, dispose };
  }
}

/**
 * `run` of a case whose calls are `each` operations of a program, in turn: one crossing from JavaScript runs many.
 */
export function programRun(frame: Frame, program: Program, each = 1): Case['run'] {
  const { length } = program;
  let next = 0;
  return async (calls) => {
    for (let left = calls * each; left > 0;) {
      const to = Math.min(length, next + left);
      await frame.run(next, to);
      left -= to - next;
      next = to === length ? 0 : to;
    }
  };
}

/** A group of one case, with what it owns. */
export function single(one: Case, ...owned: (Disposable | Matrix | KvCache)[]): Group {
  return { cases: [one], dispose: () => owned.forEach((o) => o.dispose()) };
}
