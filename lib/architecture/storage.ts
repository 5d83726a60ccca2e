/**
 * How a matrix or bias lies in a checkpoint: under its own name, as floats or in FP8, or in a tensor of several experts, as floats or in
 * MXFP4. Whoever reads, checks, hashes or releases weights asks here.
 */
import type { Control, RowRange, Tensor } from '../../types/native';
import type { FieldReader } from '../checkpoint/config';
import { WEIGHT_DTYPES } from '../checkpoint/dtypes';
import { fp8BlockSize, publishedFormat } from '../checkpoint/published';
import { moduleOf } from '../checkpoint/quantized';
import { EacMoeError } from '../errors';
import { native } from '../native';
import type { ExpertPart, LinearSpec } from './types';

/** A matrix [out, in] or a bias [out] under its logical name. */
export interface Wanted {
  name: string;
  shape: number[];
  /** Where it lies if the checkpoint fuses experts. */
  fused?: ExpertPart;
}

/** A tensor of the file and what it must be like. */
export interface StoredTensor {
  name: string;
  dtypes: readonly string[];
  shape: number[];
}

/** `tensors` are all that it takes, in this order: values before scales. */
export type Storage =
  | { kind: 'plain'; tensors: [StoredTensor] }
  | { kind: 'fp8'; tensors: [StoredTensor, StoredTensor]; block: [number, number] }
  | { kind: 'fused'; tensors: [StoredTensor]; part: ExpertPart }
  | { kind: 'mxfp4'; tensors: [StoredTensor, StoredTensor]; part: ExpertPart };

/** What of a checkpoint tells how a tensor is stored. */
interface Contents {
  readonly config?: FieldReader;
  has(name: string): boolean;
  info(name: string): { dtype: string };
}

export function weightOf({ weight, out, in: inputs, fused }: LinearSpec): Wanted {
  return { name: weight, shape: [out, inputs], ...(fused && { fused: fused.weight }) };
}

export function biasOf({ weight, bias, out, fused }: LinearSpec): Wanted | undefined {
  if (!bias && !fused?.bias) return undefined;
  return {
    name: bias ?? `${moduleOf(weight)}.bias`,
    shape: [out],
    ...(fused?.bias && { fused: fused.bias }),
  };
}

/** [experts, ...] -> the shape of the blocks of 32 along the inputs; the file's rows are output channels whether `transposed` or not. */
function mxfp4Shape({ shape, transposed, tensor }: ExpertPart): number[] {
  const [experts, a, b] = shape as [number, number, number];
  const [rows, inputs] = transposed ? [b, a] : [a, b];
  if (inputs % 32 !== 0) {
    throw new EacMoeError(
      'UNSUPPORTED_MODEL',
      `'${tensor}_blocks': ${inputs} inputs are no multiple of 32, the block size of MXFP4`,
    );
  }
  return [experts, rows, inputs / 32];
}

/** How `wanted` is stored, or null where the checkpoint lacks it. */
export function storageOf(source: Contents, { name, shape, fused }: Wanted): Storage | null {
  if (source.has(name)) {
    const isFp8 = source.info(name).dtype === 'F8_E4M3';
    if (!isFp8 || !source.config || publishedFormat(source.config) !== 'fp8' || shape.length !== 2) {
      return { kind: 'plain', tensors: [{ name, dtypes: WEIGHT_DTYPES, shape }] };
    }
    const block = fp8BlockSize(source.config);
    const scales = [Math.ceil(shape[0]! / block[0]), Math.ceil(shape[1]! / block[1])];
    const tensors: [StoredTensor, StoredTensor] = [
      { name, dtypes: ['F8_E4M3'], shape },
      { name: `${name}_scale_inv`, dtypes: WEIGHT_DTYPES, shape: scales },
    ];
    return { kind: 'fp8', tensors, block };
  }
  if (!fused) return null;
  if (source.has(fused.tensor)) {
    const tensor = { name: fused.tensor, dtypes: WEIGHT_DTYPES, shape: fused.shape };
    return { kind: 'fused', tensors: [tensor], part: fused };
  }
  if (!source.has(`${fused.tensor}_blocks`)) return null;
  const scales = mxfp4Shape(fused);
  const tensors: [StoredTensor, StoredTensor] = [
    { name: `${fused.tensor}_blocks`, dtypes: ['U8'], shape: [...scales, 16] },
    { name: `${fused.tensor}_scales`, dtypes: ['U8'], shape: scales },
  ];
  return { kind: 'mxfp4', tensors, part: fused };
}

/** Names of the tensors in which the wanted ones are stored, each once. */
export function storedNames(source: Contents, wanted: Wanted[]): string[] {
  const names = wanted.flatMap((w) => storageOf(source, w)?.tensors.map((t) => t.name) ?? []);
  return [...new Set(names)];
}

/** What decoding needs of a checkpoint. */
export interface WeightReader extends Contents {
  readonly dir: string;
  tensor(name: string, expectedShape?: readonly number[]): Tensor;
}

/** `use` of a tensor of the file, which is let go of afterwards. */
function withTensor<T>(reader: WeightReader, stored: StoredTensor, use: (tensor: Tensor) => T): T {
  const tensor = reader.tensor(stored.name, stored.shape);
  try {
    return use(tensor);
  } finally {
    tensor.dispose();
  }
}

/** Rows of one expert of [experts, rows, ...], as a matrix of its own. */
function expertRows(reader: WeightReader, stored: StoredTensor, expert: number): Tensor {
  return withTensor(reader, stored, (all) => {
    const [experts, rows, ...rest] = stored.shape as [number, number, ...number[]];
    const width = rest.reduce((a, b) => a * b, 1);
    const flat = all.reshape([experts * rows, width]);
    try {
      return flat.rows(expert * rows, (expert + 1) * rows);
    } finally {
      flat.dispose();
    }
  });
}

/** Whether biases, [experts, .], or matrices, [experts, ., .], of a fused tensor are its columns. */
const isTransposed = ({ shape, transposed }: ExpertPart): boolean => transposed && shape.length === 3;

/** Whether the values lie in the file as they are wanted. */
export function isView(storage: Storage): boolean {
  if (storage.kind === 'fused') return storage.part.step === 1 && !isTransposed(storage.part);
  return storage.kind === 'plain';
}

/** A view of the mapped file, or undefined where the values must be gathered or decoded first. */
export function viewStored(reader: WeightReader, wanted: Wanted, storage: Storage): Tensor | undefined {
  if (storage.kind === 'plain') return reader.tensor(wanted.name, wanted.shape);
  if (storage.kind !== 'fused' || !isView(storage)) return undefined;
  const { expert, from } = storage.part;
  const all = expertRows(reader, storage.tensors[0], expert);
  const part = all.rows(from, from + wanted.shape[0]!);
  const view = part.reshape(wanted.shape);
  all.dispose();
  part.dispose();
  return view;
}

/**
 * Reads a matrix or bias: a view of the mapped file where it lies there as it is, else memory of its own: experts' parts in the dtype of
 * the file, FP8 and MXFP4 as bf16.
 *
 * @throws EacMoeError NON_FINITE for NaN codes and scales, naming the tensor; ABORTED
 */
export async function readStored(
  reader: WeightReader,
  wanted: Wanted,
  storage: Storage,
  control?: Control,
): Promise<Tensor> {
  const view = viewStored(reader, wanted, storage);
  if (view) return view;
  const tensors: Tensor[] = [];
  try {
    const open = ({ name, shape }: StoredTensor) => reader.tensor(name, shape);
    const part = storage.kind === 'fused' || storage.kind === 'mxfp4' ? storage.part : undefined;
    for (const stored of storage.tensors)
      tensors.push(part ? expertRows(reader, stored, part.expert) : open(stored));
    return await convert(tensors, wanted, storage, control);
  } catch (cause) {
    if (!(cause instanceof EacMoeError) || cause.code !== 'NON_FINITE') throw cause;
    const [{ name }] = storage.tensors;
    const of = name === wanted.name ? '' : ` (of '${wanted.name}')`;
    const what = `tensor '${name}'${of}: ${cause.message}; the checkpoint is damaged`;
    throw new EacMoeError('NON_FINITE', `${reader.dir}: ${what}`, { cause });
  } finally {
    for (const tensor of tensors) tensor.dispose();
  }
}

async function convert(
  [values, scales]: Tensor[],
  wanted: Wanted,
  storage: Storage,
  control?: Control,
): Promise<Tensor> {
  if (storage.kind === 'plain') return values!;
  if (storage.kind === 'fp8') return native().decodeFp8(values!, scales!, storage.block, control);
  const { from, step } = storage.part;
  const range: RowRange = { from, step, rows: wanted.shape[0]! };
  if (storage.kind === 'mxfp4') return native().decodeMxfp4(values!, scales!, range, control);
  const transposed = isTransposed(storage.part);
  const part = await native().copyPart(values!, { ...range, transposed }, control);
  const result = part.reshape(wanted.shape);
  part.dispose();
  return result;
}
