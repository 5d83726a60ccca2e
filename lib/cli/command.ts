/** What all commands share: the options' parsers, interruption, results and errors. */
import { Command, CommanderError, InvalidArgumentError } from 'commander';
import { EacMoeError } from '../index';
import { progressDisplay, type ProgressDisplay } from './progress';

export const EXIT = { success: 0, failure: 1, usage: 2, interrupted: 130 } as const;

/** What a command's action gets beside its options. */
export interface Context {
  signal: AbortSignal;
  progress: ProgressDisplay;
  /** Shows what the library reports. */
  onProgress: (progress: { fraction: number; message: string }) => void;
}

/** The argument that names a model. */
export const MODEL = 'model directory, or hf:<owner>/<name>[@revision] of the Hugging Face hub';

export interface CommonOptions {
  json?: boolean;
}

/**
 * Runs a command's work: `work` returns the result, which is printed as one JSON document with --json and by `print` without.
 * Ctrl-C aborts; a second one ends the process at once.
 */
export async function perform<T>(
  options: CommonOptions,
  work: (context: Context) => Promise<T>,
  print: (result: T) => void,
): Promise<void> {
  const controller = new AbortController();
  const interrupt = () => {
    if (controller.signal.aborted) process.exit(EXIT.interrupted);
    controller.abort(new Error('interrupted'));
  };
  process.on('SIGINT', interrupt);
  const progress = progressDisplay(process.stderr);
  try {
    const onProgress: Context['onProgress'] = ({ fraction, message }) => progress.update(fraction, message);
    const result = await work({ signal: controller.signal, progress, onProgress });
    progress.end();
    if (options.json) process.stdout.write(`${JSON.stringify(result, null, 2)}\n`);
    else print(result);
  } finally {
    progress.end();
    process.off('SIGINT', interrupt);
  }
}

/** Prints what went wrong and returns the exit code. */
export function report(error: unknown): number {
  // Commander has printed its own message, or the help that was asked for.
  if (error instanceof CommanderError) return error.exitCode === 0 ? EXIT.success : EXIT.usage;
  const code = error instanceof EacMoeError ? error.code : undefined;
  const message = error instanceof Error ? error.message : String(error);
  const stack = process.env.EAC_MOE_DEBUG === '1' && error instanceof Error ? error.stack : undefined;
  process.stderr.write(
    `eac-moe: ${code === 'ABORTED' ? 'interrupted' : (stack ?? message.replaceAll('\n', ' '))}\n`,
  );
  if (code === 'ABORTED') return EXIT.interrupted;
  return code === 'INVALID_ARGUMENT' ? EXIT.usage : EXIT.failure;
}

/** The program: mistakes in usage are thrown, and printed like all errors. */
export function newProgram(name: string, description: string): Command {
  return new Command(name)
    .description(description)
    .exitOverride()
    .configureOutput({ outputError: (text, write) => write(text.replace(/^error: /, 'eac-moe: ')) });
}

export function newCommand(name: string, description: string): Command {
  return newProgram(name, description).option(
    '--json',
    'print one JSON document on stdout and nothing else there',
  );
}

/** A parser of numbers for an option; `what` says what is allowed. */
export function number(what: string, ok: (value: number) => boolean): (text: string) => number {
  return (text) => {
    const value = text.trim() === '' ? NaN : Number(text);
    if (!Number.isFinite(value) || !ok(value)) throw new InvalidArgumentError(`Expected ${what}.`);
    return value;
  };
}

export const positiveInteger = number('a positive integer', (n) => Number.isSafeInteger(n) && n > 0);
export const wholeNumber = number('an integer, 0 or more', (n) => Number.isSafeInteger(n) && n >= 0);
export const positiveNumber = number('a number above 0', (n) => n > 0);
export const alpha = number('a number in (0, 1]', (n) => n > 0 && n <= 1);

/** A parser that allows these numbers and words. */
export function oneOf<const T extends readonly (number | string)[]>(
  ...allowed: T
): (text: string) => T[number] {
  return (text) => {
    const found = allowed.find((value) =>
      typeof value === 'number' ? text.trim() !== '' && Number(text) === value : text === value,
    );
    if (found === undefined) throw new InvalidArgumentError(`Allowed are ${allowed.join(', ')}.`);
    return found;
  };
}

/** Adds the options of every command that computes. */
export function withDevice(command: Command): Command {
  return command
    .option('--threads <n>', 'threads to compute with (default: all CPUs)', positiveInteger)
    .option('--device <device>', 'auto, cpu or cuda', oneOf('auto', 'cpu', 'cuda'), 'auto');
}

/** 12.3 MB */
export function megabytes(bytes: number): string {
  if (bytes >= 1e10) return `${(bytes / 1e9).toFixed(2)} GB`;
  return `${(bytes / 1e6).toFixed(2)} MB`;
}

export function percent(share: number): string {
  return `${(100 * share).toFixed(1)} %`;
}

/** Lines of `name  value`, the values in one column. */
export function printFields(fields: [name: string, value: string][]): void {
  const width = Math.max(...fields.map(([name]) => name.length));
  for (const [name, value] of fields) process.stdout.write(`${name.padEnd(width)}  ${value}\n`);
}
