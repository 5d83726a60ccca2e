/** Progress on stderr: a bar with the time left on a terminal, otherwise a plain line now and then. */
import { SingleBar } from 'cli-progress';
import type { WriteStream } from 'node:tty';

export interface ProgressDisplay {
  /** `fraction` from 0 to 1; when it falls, another job begins. */
  update(fraction: number, message: string): void;
  end(): void;
}

/** Without a terminal, a line each time so much more is done, or the message changes and so many seconds have passed. */
const LINE_STEP = 0.1;
const LINE_SECONDS = 5;

export function progressDisplay(stream: WriteStream): ProgressDisplay {
  return stream.isTTY ? bar(stream) : lines(stream);
}

/** 75 -> 1m15s; nothing while there is nothing to go by. */
export function timeLeft(fraction: number, seconds: number): string {
  if (!(fraction > 0.005) || seconds < 1) return '';
  const left = Math.round((seconds * (1 - fraction)) / fraction);
  const [hours, minutes] = [Math.floor(left / 3600), Math.floor(left / 60) % 60];
  if (hours > 0) return `${hours}h${String(minutes).padStart(2, '0')}m`;
  return minutes > 0 ? `${minutes}m${String(left % 60).padStart(2, '0')}s` : `${left}s`;
}

function clock(): () => number {
  const begun = performance.now();
  return () => (performance.now() - begun) / 1000;
}

function bar(stream: WriteStream): ProgressDisplay {
  let shown: SingleBar | undefined;
  let elapsed = clock();
  let last = 0;
  return {
    update(fraction, message) {
      if (!shown || fraction < last) elapsed = clock();
      last = fraction;
      if (!shown) {
        const format = '{bar} {percentage} % | {left} | {message}';
        shown = new SingleBar({
          format,
          stream,
          barsize: 30,
          hideCursor: true,
          clearOnComplete: true,
          linewrap: false,
        });
        shown.start(100, 0, { left: '', message });
      }
      const left = timeLeft(fraction, elapsed());
      shown.update(Math.floor(100 * fraction), { left: left ? `${left} left` : '', message });
    },
    end() {
      shown?.stop();
      shown = undefined;
    },
  };
}

function lines(stream: WriteStream): ProgressDisplay {
  let elapsed = clock();
  let [last, lastMessage, lastTime] = [-1, '', 0];
  return {
    update(fraction, message) {
      const begins = last < 0 || fraction < last;
      if (begins) elapsed = clock();
      const seconds = elapsed();
      const news = message !== lastMessage && seconds - lastTime >= LINE_SECONDS;
      if (!begins && !news && fraction - last < LINE_STEP && (fraction < 1 || last >= 1)) return;
      [last, lastMessage, lastTime] = [fraction, message, seconds];
      const left = timeLeft(fraction, seconds);
      const ahead = left && fraction < 1 ? `, ${left} left` : '';
      stream.write(`${String(Math.floor(100 * fraction)).padStart(3)} % ${message}${ahead}\n`);
    },
    end() {},
  };
}
