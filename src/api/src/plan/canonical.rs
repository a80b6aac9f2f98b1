//! Canonical JSON (RFC 8785): one text for one value, fit for hashing.

use std::fmt::Write as _;

use serde_json::Value;

/// `value` as RFC 8785 writes it: keys sorted by UTF-16 code units, no spaces, numbers as ECMAScript prints them, so that `1.0` and `1` are one.
///
/// Integers keep all their digits: those beyond 2^53, which RFC 8785 leaves out, are written as they are.
pub fn canonical_json(value: &Value) -> String {
    let mut out = String::new();
    write_value(&mut out, value);
    out
}

fn write_value(out: &mut String, value: &Value) {
    match value {
        Value::Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
            Some(float) => write_float(out, float),
            None => out.push_str(&number.to_string()),
        },
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                write_value(out, item);
            }
            out.push(']');
        }
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by(|(a, _), (b, _)| a.encode_utf16().cmp(b.encode_utf16()));
            out.push('{');
            for (i, (key, item)) in entries.into_iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                write_string(out, key);
                out.push(':');
                write_value(out, item);
            }
            out.push('}');
        }
        Value::String(text) => write_string(out, text),
        Value::Bool(_) | Value::Null => out.push_str(&value.to_string()),
    }
}

/// serde_json escapes exactly what RFC 8785 asks for, in the same form.
fn write_string(out: &mut String, text: &str) {
    out.push_str(&Value::from(text).to_string());
}

/// ECMAScript's `Number::toString`: the shortest digits that read back as the same number, plain from 1e-6 to below 1e21.
fn write_float(out: &mut String, float: f64) {
    if float == 0.0 {
        out.push('0');
        return;
    }
    // Rust's `{:e}` gives the same shortest digits, as d.ddde-x.
    let text = format!("{:e}", float.abs());
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let digits = mantissa.replace('.', "");
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if float < 0.0 {
        out.push('-');
    }
    let count = i32::try_from(digits.len()).unwrap_or(i32::MAX);
    if (0..21).contains(&exponent) {
        if count <= exponent + 1 {
            out.push_str(&digits);
            out.extend(std::iter::repeat_n('0', usize::try_from(exponent + 1 - count).unwrap_or(0)));
        } else {
            let (whole, fraction) = digits.split_at(usize::try_from(exponent + 1).unwrap_or(0));
            let _infallible = write!(out, "{whole}.{fraction}");
        }
    } else if (-6..0).contains(&exponent) {
        out.push_str("0.");
        out.extend(std::iter::repeat_n('0', usize::try_from(-exponent - 1).unwrap_or(0)));
        out.push_str(&digits);
    } else {
        let (first, rest) = digits.split_at(1);
        out.push_str(first);
        if !rest.is_empty() {
            let _infallible = write!(out, ".{rest}");
        }
        let _infallible = write!(out, "e{exponent:+}");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::canonical_json;

    #[test]
    fn numbers_are_written_as_ecmascript_does() {
        for (value, text) in [
            (1.0, "1"),
            (0.5, "0.5"),
            (-2.25, "-2.25"),
            (1e-4, "0.0001"),
            (1e-6, "0.000001"),
            (1e-7, "1e-7"),
            (1.5e-8, "1.5e-8"),
            (1e20, "100000000000000000000"),
            (1e21, "1e+21"),
            (1.25e22, "1.25e+22"),
            (333_333_333.333_333_3, "333333333.3333333"),
            (-0.0, "0"),
            (123_456.0, "123456"),
        ] {
            assert_eq!(canonical_json(&json!(value)), text);
        }
        assert_eq!(canonical_json(&json!(u64::MAX)), "18446744073709551615");
    }

    /// The example of RFC 8785, section 3.2.2 to 3.2.3 (sorting by UTF-16 code units).
    #[test]
    fn the_examples_of_rfc_8785_come_out() {
        let value = json!({
            "numbers": [333_333_333.333_333_3, 1e30, 4.5, 0.002, 1e-27],
            "string": "\u{20ac}$\u{f}\nA'B\"\\\\\"/",
            "literals": [null, true, false]
        });
        assert_eq!(
            canonical_json(&value),
            "{\"literals\":[null,true,false],\"numbers\":[333333333.3333333,1e+30,4.5,0.002,1e-27],\"string\":\"\u{20ac}$\\u000f\\nA'B\\\"\\\\\\\\\\\"/\"}"
        );
        let keys = json!({"\u{20ac}": 1, "\r": 2, "\u{fb33}": 3, "1": 4, "\u{1f600}": 5, "\u{80}": 6, "\u{f6}": 7});
        let order: Vec<char> = canonical_json(&keys).chars().filter(char::is_ascii_digit).collect();
        // The second is the key "1" itself.
        assert_eq!(order, ['2', '1', '4', '6', '7', '1', '5', '3']);
    }
}
