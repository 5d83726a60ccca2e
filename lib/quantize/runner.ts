/** Runs the stages of one decoder layer over stored hidden states. */
import type { Control, Device, Frame, Matrix, Program, Register, Tensor } from '../../types/native';
import type { GluSpec, LayerSpec, LinearSpec, MoeSpec } from '../architecture/types';
import { pushLayer, type LayerStages } from '../model/layer';
import { pushLinear, type WeightSource } from '../model/linear';
import { ProgramBuilder, type Range } from '../model/program';
import { native } from '../native';

/** Some weights replaced, the others from elsewhere. */
export class Overlay implements WeightSource {
  readonly matrices = new Map<string, Matrix>();
  readonly #base: WeightSource;

  constructor(base: WeightSource) {
    this.#base = base;
  }

  matrix(spec: LinearSpec): Matrix {
    return this.matrices.get(spec.weight) ?? this.#base.matrix(spec);
  }

  bias(spec: LinearSpec): Tensor {
    return this.#base.bias(spec);
  }

  tensor(name: string, shape: number[]): Tensor {
    return this.#base.tensor(name, shape);
  }
}

/** Registers of a layer that live in stored tensors: rows of the batch are rows of the tensor. */
export type Bindings = [Register, Tensor][];

/** A layer under given weights, on the device where the hidden states lie. Rebuilt (cheaply) whenever weights change. */
export class LayerRunner {
  readonly stages: LayerStages;
  readonly #program: Program;
  #frame: Frame;

  constructor(spec: LayerSpec, weights: WeightSource, device: Device) {
    const b = new ProgramBuilder();
    this.stages = pushLayer(b, weights, spec, 0);
    this.#program = b.build(device);
    this.#frame = native().createFrame(this.#program);
  }

  /**
   * Runs from the beginning of stage `from` to the end of stage `to`, over rows [begin, end) of the bound tensors. The other registers
   * can be read from the frame until the next run.
   */
  async run(batch: Batch, bindings: Bindings, from: Range, to: Range, control: Control): Promise<Frame> {
    for (const [register, tensor] of bindings) {
      const view = tensor.rows(batch.begin, batch.end);
      this.#frame.bind(register, view);
      view.dispose();
    }
    this.#frame.begin(
      null,
      batch.lengths.map((length) => ({ length })),
    );
    await this.#frame.run(from.from, to.to, control);
    // The next run may bind others, and have more rows.
    for (const [register] of bindings) this.#frame.bind(register, null);
    return this.#frame;
  }

  /** Frees the registers' memory until the next run. */
  release(): void {
    this.#frame.dispose();
    this.#frame = native().createFrame(this.#program);
  }

  dispose(): void {
    this.#frame.dispose();
    this.#program.dispose();
  }
}

/** Whole sequences that run together: rows [begin, end) of the streams. */
export interface Batch {
  begin: number;
  end: number;
  lengths: number[];
}

/** Cuts sequences into batches of at most `tokens` tokens, or one sequence where that is longer. */
export function makeBatches(lengths: number[], tokens = 4096): Batch[] {
  const batches: Batch[] = [];
  for (const length of lengths) {
    const last = batches.at(-1);
    if (last && last.end - last.begin + length <= tokens) {
      last.lengths.push(length);
      last.end += length;
    } else {
      const begin = last?.end ?? 0;
      batches.push({ begin, end: begin + length, lengths: [length] });
    }
  }
  return batches;
}

/** activation(gate x) * up x of one expert: the input of its down projection. */
export class GluHidden {
  readonly #program: Program;
  readonly #frame: Frame;
  readonly #x: Register;
  readonly #gate: Register;

  constructor(spec: GluSpec, activation: MoeSpec['activation'], weights: WeightSource, device: Device) {
    const b = new ProgramBuilder();
    this.#x = b.register('x', spec.gate.in);
    this.#gate = b.register('gate', spec.gate.out);
    const up = b.register('up', spec.up.out);
    pushLinear(b, weights, spec.gate, this.#x, this.#gate);
    pushLinear(b, weights, spec.up, this.#x, up);
    b.push({ op: 'glu', gate: this.#gate, up, activation });
    this.#program = b.build(device);
    this.#frame = native().createFrame(this.#program);
  }

  /** x f32 [n, in] -> f32 [n, hidden], valid until the next call. Disposes x. */
  async run(x: Tensor, control: Control): Promise<Tensor> {
    const [length] = x.shape as [number];
    this.#frame.bind(this.#x, x);
    x.dispose();
    this.#frame.begin(null, [{ length }]);
    await this.#frame.run(0, this.#program.length, control);
    return this.#frame.tensor(this.#gate);
  }

  dispose(): void {
    this.#frame.dispose();
    this.#program.dispose();
  }
}
