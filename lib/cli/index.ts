#!/usr/bin/env node
/** The command line: exits 0 on success, 2 on wrong usage, 1 on failure, 130 when interrupted. */
import { version } from '../index';
import { EXIT, newProgram, report } from './command';
import { benchCommand } from './bench';
import { evalCommand } from './eval';
import { exportCommand } from './export';
import { generateCommand } from './generate';
import { inspectCommand } from './inspect';
import { quantizeCommand } from './quantize';

async function main(args: string[]): Promise<number> {
  // A reader that has seen enough (`| head`) is no failure.
  process.stdout.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code === 'EPIPE') process.exit(EXIT.success);
    throw error;
  });
  const program = newProgram('eac-moe', 'compress Mixture-of-Experts language models and run them').version(
    version,
  );
  for (const command of [
    inspectCommand(),
    quantizeCommand(),
    evalCommand(),
    generateCommand(),
    exportCommand(),
    benchCommand(),
  ]) {
    program.addCommand(command);
  }
  try {
    await program.parseAsync(args, { from: 'user' });
    return EXIT.success;
  } catch (error) {
    return report(error);
  }
}

void main(process.argv.slice(2)).then((code) => {
  process.exitCode = code;
});
