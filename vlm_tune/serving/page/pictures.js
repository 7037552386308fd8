/** Images as they are sent: readable by the server, and no larger than a model makes use of. */

import { identifier } from "./chats.js";

/** The longest side that is sent, in pixels; what is larger is scaled down. */
export const LONGEST_SIDE = 2048;
/** The largest file that is sent as it is, in bytes. */
const LARGEST_FILE = 4 * 2 ** 20;
const JPEG = "image/jpeg";
const JPEG_QUALITY = 0.92;
/** Files of these types are sent as they are where their size allows; others become PNG. */
const SENT_AS_THEY_ARE = new Set([JPEG, "image/png", "image/webp"]);

/** A file that can't be shown or sent; its message is for the user. */
export class PictureError extends Error {}

/**
 * Draws an image, upright by its EXIF orientation, scaled into `LONGEST_SIDE`.
 *
 * @param {ImageBitmap} bitmap
 * @param {number} scale
 * @param {string} type Of the file to make. JPEG has no transparency: its ground is white.
 * @returns {Promise<Blob>}
 */
async function drawn(bitmap, scale, type) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  if (type === JPEG) {
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
  }
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, type, JPEG_QUALITY));
}

/** Returns the file to send for an image: the same one, or a smaller one of the same picture. */
async function sendable(file, bitmap, scale) {
  const fits = scale === 1 && file.size <= LARGEST_FILE;
  if (fits && SENT_AS_THEY_ARE.has(file.type)) return file;
  if (file.type === JPEG) return drawn(bitmap, scale, JPEG);
  const png = await drawn(bitmap, scale, "image/png");
  return png && png.size <= LARGEST_FILE ? png : drawn(bitmap, scale, JPEG);
}

/**
 * Reads an image file that a user chose, dropped or pasted.
 *
 * @param {File} file
 * @returns {Promise<import("./chats.js").Picture>}
 * @throws {PictureError} The browser can't read it.
 */
export async function pictureOf(file) {
  const name = file.name || "image.png";
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    throw new PictureError(
      `This browser can't read ${name} as an image. JPEG, PNG, WebP and GIF files work.`,
    );
  }
  const { width, height } = bitmap;
  const scale = Math.min(1, LONGEST_SIDE / Math.max(width, height));
  const blob = await sendable(file, bitmap, scale);
  bitmap.close();
  if (!blob) throw new PictureError(`${name} has ${width} × ${height} pixels, too many to scale.`);
  return {
    id: identifier(),
    name,
    blob,
    width: Math.round(width * scale),
    height: Math.round(height * scale),
    from: scale < 1 ? { width, height } : null,
  };
}

/** Returns the image files among what was dropped or pasted. */
export function imageFiles(transfer) {
  return [...transfer.files].filter((file) => file.type.startsWith("image/"));
}

/**
 * Returns a file as a URL that holds its bytes.
 *
 * @param {Blob} blob
 * @returns {Promise<string>}
 */
export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
