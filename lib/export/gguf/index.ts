/** Export to GGUF: one file with weights, metadata and tokenizer, as llama.cpp and what is built on it load. */
import { dirname, basename, resolve } from 'node:path';
import { checkSpace, makeDirectory } from '../../checkpoint/files';
import { checkFree } from '../directory';
import type { ExportJob } from '../job';
import type { ExportedType } from '../options';
import { MatrixReader, type Choice } from './matrices';
import { checkFamily, familyOf, modelMetadata } from './metadata';
import { tensorPlans, type TensorPlan } from './tensors';
import { tokenizerMetadata } from './tokenizer';
import { ggmlBytes, ggufBytes, writeGguf, type GgufTensor } from './writer';

interface Result {
  bytes: number;
  types: ExportedType[];
  notes: string[];
}

export async function exportGguf(job: ExportJob): Promise<Result> {
  const { checkpoint, architecture, options } = job;
  const { config, dir } = checkpoint;
  const output = resolve(options.output);
  checkFree(output);
  const family = familyOf(config);
  checkFamily(config, architecture, family);
  const metadata = {
    ...modelMetadata(config, architecture, family, basename(resolve(dir))),
    ...tokenizerMetadata(dir, architecture.vocabSize),
  };
  const plans = tensorPlans(architecture, family, config.rope.theta);
  const reader = progressReader(job, plans);
  const choices = new Map<TensorPlan, Choice>();
  for (const plan of plans) {
    if ('matrices' in plan.from)
      choices.set(plan, await reader.choose(plan.from.matrices, options.maxLoss ?? 0));
  }
  const tensors = plans.map((plan) => tensorOf(plan, choices.get(plan), reader));
  await checkSpace(output, ggufBytes(metadata, tensors));
  await makeDirectory(dirname(output));
  const bytes = await writeGguf(output, metadata, tensors);
  return { bytes, types: typesOf(plans, tensors, choices), notes: family.note ? [family.note] : [] };
}

const size = (shape: readonly number[]): number => shape.reduce((a, b) => a * b, 1);

/** Quantized matrices are read twice: to choose types, with which the file begins, and to write. */
function progressReader(job: ExportJob, plans: TensorPlan[]): MatrixReader {
  const total = plans.reduce((sum, p) => sum + ('matrices' in p.from ? size(p.shape) : 0), 0);
  const quantized = [...job.modules.values()].reduce((sum, m) => sum + m.out * m.in, 0);
  let done = 0;
  return new MatrixReader(job, ({ weight, out, in: inputs }) => {
    done += out * inputs;
    const message = done <= quantized ? `measuring ${weight}` : `writing ${weight}`;
    job.options.onProgress?.({ fraction: (0.99 * done) / (total + quantized), message });
  });
}

function tensorOf(plan: TensorPlan, choice: Choice | undefined, reader: MatrixReader): GgufTensor {
  const { name, shape, from, rows } = plan;
  const type = choice?.type ?? 'F32';
  if ('matrices' in from) return { name, type, shape, data: () => reader.bytes(from.matrices, type, rows) };
  if ('biases' in from) return { name, type, shape, data: () => reader.biases(from.biases, rows) };
  if ('numbers' in from) return { name, type, shape, data: () => [f32Bytes(from.numbers)] };
  return {
    name,
    type,
    shape,
    data: async function* () {
      yield await reader.values(from.values);
    },
  };
}

function f32Bytes(numbers: number[]): Uint8Array {
  return new Uint8Array(Float32Array.from(numbers).buffer);
}

function typesOf(
  plans: TensorPlan[],
  tensors: GgufTensor[],
  choices: ReadonlyMap<TensorPlan, Choice>,
): ExportedType[] {
  const types = new Map<string, ExportedType & { error: number; energy: number }>();
  for (const [i, { type, shape }] of tensors.entries()) {
    const { error = 0, energy = 0 } = choices.get(plans[i]!) ?? {};
    const t = types.get(type) ?? {
      type,
      tensors: 0,
      parameters: 0,
      bytes: 0,
      loss: 0,
      maxLoss: 0,
      error: 0,
      energy: 0,
    };
    t.tensors++;
    t.parameters += size(shape);
    t.bytes += ggmlBytes(type, shape);
    t.error += error;
    t.energy += energy;
    t.loss = t.energy > 0 ? Math.sqrt(t.error / t.energy) : 0;
    t.maxLoss = Math.max(t.maxLoss, energy > 0 ? Math.sqrt(error / energy) : 0);
    types.set(type, t);
  }
  return [...types.values()].map(({ error: _, energy: __, ...t }) => t).sort((a, b) => b.bytes - a.bytes);
}
